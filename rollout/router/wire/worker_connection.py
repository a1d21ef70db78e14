"""The router's end of a connection to a worker: one request at a time, its reply in pieces."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Protocol, cast

import httptools

from rollout.router.wire.messages import Header

_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_LENGTHS = frozenset({b"content-length", b"transfer-encoding"})


class Listener(Protocol):
    """Who waits for the reply to one request."""

    def reply_begins(self, status: int, headers: list[Header]) -> None:
        """The status and headers, names in lower case."""
        ...

    def reply_piece(self, data: bytes) -> None:
        """A piece of the body."""
        ...

    def reply_ends(self) -> None:
        """The reply is whole."""
        ...

    def reply_lost(self, why: str) -> None:
        """The connection ended before the reply did."""
        ...


class Home(Protocol):
    """Where a connection waits between two requests."""

    def rested(self, connection: WorkerConnection) -> None:
        """It may be used again."""
        ...

    def gone(self, connection: WorkerConnection) -> None:
        """It has ended."""
        ...

    def alive(self) -> None:
        """Something came from the worker."""
        ...


class WorkerConnection(asyncio.Protocol):
    """One connection. used: it has brought a reply before, so that its loss may say no more than
    that the worker had closed what nobody used."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._headers: list[Header] = []
        self._until_close = False
        self.used = False
        self.answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _keep_alive(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._home.gone(self)
        # A reply without a length ends with its connection.
        if self.answering and exc is None and self._until_close:
            self._end()
        self._lose("the connection ended" if exc is None else str(exc) or type(exc).__name__)

    def data_received(self, data: bytes) -> None:
        if self._listener is None:
            # Nobody asked: whatever this is, it is no reply.
            self.abort()
            return
        self._home.alive()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lose(f"what came is no reply of HTTP/1.1: {error}")
            self.abort()

    def pause(self, *, paused: bool) -> None:
        """Read no more for now, or again."""
        if self._transport is not None:
            (self._transport.pause_reading if paused else self._transport.resume_reading)()

    def send(self, data: bytes, listener: Listener) -> None:
        """Send a request; `listener` learns what becomes of it. Not while another is open."""
        assert self._listener is None, "a request is open on this connection"
        self._listener = listener
        self._parser = httptools.HttpResponseParser(self)
        self._headers = []
        self.answering = False
        if self._transport is None:
            asyncio.get_running_loop().call_soon(self._lose, "the connection ended")
        else:
            self._transport.write(data)

    def abort(self) -> None:
        """End the connection; its listener hears nothing more."""
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    def cut(self) -> None:
        """End the connection; its listener is told that the reply is lost."""
        if self._transport is not None:
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status >= 200 and self._listener is not None:
            self.answering = True
            self._until_close = not any(name in _LENGTHS for name, _ in headers)
            self._listener.reply_begins(status, headers)

    def on_body(self, body: bytes) -> None:
        if self._listener is not None:
            self._listener.reply_piece(body)

    def on_message_complete(self) -> None:
        if self.answering:
            self._end()

    def _end(self) -> None:
        keep = self._parser.should_keep_alive()
        listener, self._listener = self._listener, None
        self.answering, self.used = False, True
        if listener is None:
            return
        if keep and self._transport is not None:
            self._transport.resume_reading()
            self._home.rested(self)
        elif self._transport is not None:
            self._transport.close()
        listener.reply_ends()

    def _lose(self, why: str) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.reply_lost(why)


def _keep_alive(opened: socket.socket) -> None:
    """Have the system ask whether the connection is still there. A machine that was started again
    answers that it is not, where its new server would say that it is well."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        # Systems differ in which of them they have.
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
