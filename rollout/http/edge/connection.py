"""HTTP connections that do not wait for ever for a request to arrive."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from engine.errors import SlipstreamError
from rollout.http.edge.departure import Departure
from rollout.http.edge.errors import error_body
from rollout.http.edge.joined_writes import JoinedWrites

_MAX_HEAD_BYTES = 64 << 10
"""Most bytes that may come without a byte of a body: headers, and what follows a chunked body."""


class HeadersTimeout(SlipstreamError):
    """The headers of a request did not arrive in time."""

    status = 408


class HeadersTooLarge(SlipstreamError):
    """The headers of a request do not end."""

    status = 431


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes a connection whose request is not there in time.

    receive_s: from the connection, or from the first byte of a later request, to the end of the
    headers; and, where a reply was sent to a request whose body nobody read, to the end of it.
    The body of a request that is being handled has its own deadline (`body_limits.BodyReader`),
    and a connection idle between two requests is uvicorn's `timeout_keep_alive`.
    """

    def __init__(self, *args: Any, receive_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._receive_s = receive_s
        self._timer: asyncio.TimerHandle | None = None
        self._departure = Departure()
        self._in_request = False
        """Whether the first byte of a request has come and not the last."""
        self._in_head = False
        """The same of its headers."""
        self._head_bytes = 0
        """Bytes of headers, and of nothing else, in the chunks that came last."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; it has to say what it wants."""
        super().connection_made(transport)
        self._joined = JoinedWrites(transport, self.loop)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._disarm()
        super().connection_lost(exc)
        self._departure.happens()

    def data_received(self, data: bytes) -> None:
        """A part of a request, a whole one, or several."""
        if self.transport.is_closing():
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            self._disarm()
        elif self._in_request and self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._handling():
            self._disarm()
        elif self._timer is None:
            self._arm()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_request = self._in_head = True
        self._departure.body_arrived = False
        super().on_message_begin()
        self._departure.offer(cast(Scope, self.scope))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. What follows a chunked body in their form is dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request begins to be handled."""
        self._in_head, before = False, self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            # Its handler has not begun yet.
            self.cycle.transport = cast(asyncio.Transport, self._joined)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of the request."""
        self._in_request, self._head_bytes = False, 0
        self._departure.body_arrived = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The reply is sent; what is left of the body must still come to an end."""
        super().on_response_complete()
        if self._in_request and not self._handling() and not self.transport.is_closing():
            self._arm()

    def _handling(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self._receive_s, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self._handling() or self.transport.is_closing():
            return
        if self._in_head:
            self._refuse(_too_late(self._receive_s))
        else:
            self.transport.close()

    def _refuse(self, error: SlipstreamError) -> None:
        """Say why and close; only close where a reply is under way, or was sent."""
        self._disarm()
        if self._in_head and not self._handling():
            body = msgspec.json.encode(error_body(error))
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: "
            head += str(len(body)).encode() + b"\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()


def _too_late(receive_s: float) -> HeadersTimeout:
    return HeadersTimeout(
        f"the headers were not complete within {receive_s:g} s; send them faster or "
        "start the server with a larger --receive-timeout-s",
        field="headers",
    )


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(
        f"the headers have more than {_MAX_HEAD_BYTES} bytes; send fewer", field="headers"
    )
