"""Server-sent events, and calls that end when their client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SlipstreamError
from rollout.http.edge.departure import Departure, departure_of
from rollout.http.edge.errors import error_body, named_error_body

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)


@dataclass(frozen=True, kw_only=True)
class EventForm:
    """How a dialect writes its streams. frame: one event; error: the event that an error behind
    the first is; end: what follows the last."""

    frame: Callable[[Any], bytes]
    error: Callable[[SlipstreamError], Any]
    end: bytes


class ClientGone(Exception):
    """The client closed its connection before the reply; nobody is left to tell."""


class EventStream(Response):
    """A stream of events that closes its source when the client leaves.

    source: yields objects to encode. form: how they are written; by default as `data:` frames and
    `[DONE]` at the end. An error after the first event becomes an event of its own, since the
    status is sent.
    """

    def __init__(self, source: AsyncGenerator[Any, None], form: EventForm | None = None) -> None:
        super().__init__()
        self.form = form or _PLAIN
        self.raw_headers = list(_STREAM_HEADERS)
        self._source = source

    @property
    def source(self) -> AsyncGenerator[Any, None]:
        """What yields the objects, to be sent by another stream in place of this one."""
        return self._source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames until the source ends or the client does."""
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(ClientGone):
            await until_gone(self._send_frames(send), receive, departure_of(scope))

    async def _send_frames(self, send: Send) -> None:
        form = self.form
        async with contextlib.aclosing(self._source) as source:
            try:
                async for value in source:
                    await _send_body(send, form.frame(value), more=True)
            except SlipstreamError as error:
                await _send_body(send, form.frame(form.error(error)), more=True)
        await _send_body(send, form.end, more=False)


def frame(value: Any) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _named_frame(value: dict[str, Any]) -> bytes:
    """One event that is named by its type."""
    name: str = value["type"]
    return b"event: " + name.encode() + b"\n" + frame(value)


_PLAIN = EventForm(frame=frame, error=error_body, end=DONE)

NAMED = EventForm(frame=_named_frame, error=named_error_body, end=b"")
"""Events with names: OpenAI's responses and Anthropic's messages."""


async def until_gone(
    work: Coroutine[Any, Any, T], receive: Receive, departure: Departure | None = None
) -> T:
    """Result of `work`, which is cancelled when the client leaves. Raises ClientGone then.

    receive: of the ASGI protocol, the body having been read; not called if there is a departure.
    """
    watch = _Watch(receive, departure)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.left:
            raise ClientGone from None
        raise
    finally:
        watch.end()


class _Watch:
    """Cancels the task that makes it when its client leaves. Without a departure, work that never
    waits is not watched, and costs no task."""

    def __init__(self, receive: Receive, departure: Departure | None) -> None:
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._receive = receive
        self._departure = departure
        self._watched = task
        self._watcher: asyncio.Task[None] | None = None
        self._start: asyncio.Handle | None = None
        self._cancelled = False
        if departure is None:
            self._start = asyncio.get_running_loop().call_soon(self._begin)
        else:
            departure.tell(self._leave)

    @property
    def left(self) -> bool:
        """Whether the client left, and nobody else has cancelled the task. To be asked once,
        when it was cancelled."""
        return self._cancelled and self._watched.uncancel() == 0

    def end(self) -> None:
        """Watch no longer."""
        if self._departure is not None:
            self._departure.forget(self._leave)
        if self._start is not None:
            self._start.cancel()
        if self._watcher is not None:
            self._watcher.remove_done_callback(self._gone)
            self._watcher.cancel()

    def _begin(self) -> None:
        self._watcher = asyncio.ensure_future(_disconnected(self._receive))
        self._watcher.add_done_callback(self._gone)

    def _gone(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled():
            # An error is the end of the connection, too.
            watcher.exception()
            self._leave()

    def _leave(self) -> None:
        self._cancelled = True
        self._watched.cancel()


async def answer(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The reply of `work`, or an empty one that nobody reads if the client left before."""
    try:
        return await until_gone(work, request.receive, departure_of(request.scope))
    except ClientGone:
        return Response(status_code=499)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
