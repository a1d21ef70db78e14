"""Where a router's requests come in: those with a journal, and those that go on here."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineDead, InvalidRequest, SlipstreamError
from rollout.http.edge.errors import error_response
from rollout.http.edge.sse import answer
from rollout.http.journal import frames
from rollout.http.journal.call_journal import CallJournal
from rollout.http.journal.frames import BadFrames, Head, Resumed, Ticket
from rollout.http.journal.identity import Given
from rollout.http.journal.pace import Pace
from rollout.http.services import Services
from rollout.requests.json_types import decode_json

T = TypeVar("T")
Answer = Callable[[Services, bytes], Coroutine[Any, Any, Response]]


class JournalDoor:
    """Answers requests with the header `frames.HEADER`, and those of `frames.RESUME_PATH`, by
    frames; everything else goes to `app`. answers: the routes that can, by path."""

    def __init__(self, app: ASGIApp, services: Services, answers: Mapping[str, Answer]) -> None:
        self._app = app
        self._services = services
        self._answers = answers
        self._pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path == frames.RESUME_PATH and scope["method"] == "POST":
            await self._resume(scope, receive, send)
            return
        ticket = _header(scope, frames.HEADER) if path in self._answers else b""
        if not ticket or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            resumed = Resumed(path, _ticket(ticket, Ticket), 0)
        except SlipstreamError as error:
            await error_response(error, path)(scope, receive, send)
            return
        await self._run(resumed, [], await request.body(), request, send)

    async def _resume(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            resumed, records, body = _read_resume(await request.body())
            if resumed.path not in self._answers:
                raise InvalidRequest(f"{resumed.path[:200]} has no journal", field="path")
        except SlipstreamError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._run(resumed, records, body, request, send)

    async def _run(
        self,
        resumed: Resumed,
        records: Sequence[bytes],
        body: bytes,
        request: Request,
        send: Send,
    ) -> None:
        services, out = self._services, _FramedReply(send, resumed)
        journal = CallJournal(
            services.engine,
            records,
            num_pieces=resumed.num_pieces,
            pace=self._pace,
            write=lambda record, version: out.write(
                record, "" if version is None else services.labels.text(version)
            ),
            flush=out.flush,
        )
        generator = services.generator.seeded(resumed.ticket.seed).journaled(journal)
        seen = dataclasses.replace(services, generator=generator, identity=Given(resumed.ticket))
        try:
            reply = await answer(request, self._answers[resumed.path](seen, body))
        except EngineDead as error:
            out.lose(error)
        except SlipstreamError as error:
            reply = error_response(error, resumed.path)
        try:
            if out.lost is None:
                out.watch(journal)
                await reply(request.scope, request.receive, out)
        finally:
            journal.close()
        await out.end()


class _FramedReply:
    """The `send` of one reply: what it is given becomes frames, but for the pieces of the body that
    the client has; the first one says whose reply it is. lost: why nothing more is to be said."""

    def __init__(self, send: Send, resumed: Resumed) -> None:
        self._send = send
        self._skip = resumed.num_pieces
        self._parts = [frames.frame(frames.TICKET, resumed.ticket.name.encode())]
        self._version = ""
        self._begun = False
        # A flush of its own comes between the pieces of the reply.
        self._sending = asyncio.Lock()
        self._journal: CallJournal | None = None
        self.lost: EngineDead | None = None

    def watch(self, journal: CallJournal) -> None:
        """Say nothing more once the journal is lost."""
        self._journal = journal

    def lose(self, error: EngineDead) -> None:
        """Nothing more comes from here."""
        self.lost = error

    def write(self, record: bytes, version: str) -> None:
        """Note a record, for the next piece or flush."""
        if version and version != self._version:
            self._version = version
            self._parts.append(frames.frame(frames.VERSION, version.encode()))
        self._parts.append(frames.frame(frames.RECORD, record))

    async def flush(self) -> None:
        """Send what was noted."""
        await self._out(more=True)

    async def __call__(self, message: Message) -> None:
        """Take one message of the ASGI protocol."""
        if self._journal is not None and self._journal.lost is not None:
            self.lost = self._journal.lost
        if self.lost is not None:
            return
        if message["type"] == "http.response.start":
            pairs = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in message["headers"]]
            head = Head(message["status"], pairs)
            self._parts.append(frames.frame(frames.HEAD, msgspec.json.encode(head)))
            return
        body = message.get("body", b"")
        if body and self._skip:
            self._skip -= 1
        elif body:
            self._parts.append(frames.frame(frames.PIECE, body))
        if message.get("more_body", False):
            await self._out(more=True)

    async def end(self) -> None:
        """End the reply, whole or lost."""
        if self._journal is not None and self._journal.lost is not None:
            self.lost = self._journal.lost
        if self.lost is None:
            self._parts.append(frames.frame(frames.END))
        else:
            self._parts.append(frames.frame(frames.LOST, self.lost.message.encode()[:4096]))
        await self._out(more=False)

    async def _out(self, *, more: bool) -> None:
        async with self._sending:
            await self._send_parts(more=more)

    async def _send_parts(self, *, more: bool) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", frames.CONTENT_TYPE)]
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await self._send(start)
        if self._parts or not more:
            data = b"".join(self._parts)
            self._parts.clear()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _read_resume(data: bytes) -> tuple[Resumed, list[bytes], bytes]:
    """What is to go on, its records and its body. Raises InvalidRequest."""
    try:
        (kind, ticket), *middle, (last, body) = frames.whole(data)
        if (kind, last) != (frames.TICKET, frames.PIECE) or any(
            kind != frames.RECORD for kind, _ in middle
        ):
            raise BadFrames("frames of another kind")
    except ValueError as error:
        raise InvalidRequest(f"this is no request to go on: {error}", field="journal") from error
    resumed = _ticket(ticket, Resumed)
    return resumed, [record for _, record in middle], body


def _ticket(data: bytes, kind: type[T]) -> T:
    """A ticket, or what it is in. Raises InvalidRequest."""
    try:
        found: T = decode_json(data, kind, what="it")
    except InvalidRequest as error:
        raise InvalidRequest(f"this is no ticket: {error.message}", field="journal") from error
    return found


def _header(scope: Scope, name: bytes) -> bytes:
    for known, value in scope["headers"]:
        if known == name:
            found: bytes = value
            return found
    return b""
