"""The outermost layer of the application: gives every request its id, and tells of its end."""

from __future__ import annotations

from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout.http.observing.access_log import log_access
from rollout.http.observing.call_notes import CALL, CallNotes
from rollout.logs.request_id import HEADER, REQUEST_ID, request_id_of


class Traced(Protocol):
    """Where spans go."""

    def ended(self, notes: CallNotes, scope: Scope) -> None:
        """A request has ended."""
        ...


class Observer:
    """The id of a request is its client's `X-Request-Id`, or drawn; the reply has it in the same
    header, and every line that is logged about it. access: log a line at its end. traces: where
    its span goes, if anywhere."""

    def __init__(self, app: ASGIApp, *, access: bool, traces: Traced | None) -> None:
        self._app = app
        self._access = access
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        client = scope.get("client")
        notes = CallNotes(
            request_id=request_id_of(given),
            method=scope["method"],
            path=scope["path"],
            client="" if client is None else client[0],
        )
        own = (HEADER, notes.request_id.encode("ascii"))

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        # Each request has a task of its own, whose context ends with it.
        REQUEST_ID.set(notes.request_id)
        CALL.set(notes)
        try:
            await self._app(scope, receive, reply)
        finally:
            if self._access:
                log_access(notes)
            if self._traces is not None:
                self._traces.ended(notes, scope)
