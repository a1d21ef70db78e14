"""The router's end of a client's connection: requests in, one reply after the other out."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools

from engine.errors import InvalidRequest, SlipstreamError
from rollout.http.edge.body_limits import BodyBudget, BodyTimeout
from rollout.http.edge.errors import BodyTooLarge
from rollout.router.wire import messages
from rollout.router.wire.messages import ClientRequest, Pairs, Reply

_MAX_HEAD_BYTES = 64 << 10
_MOST_WAITING = 16
"""Requests that a client may send ahead of their replies."""


class Handler(Protocol):
    """Who works on one request."""

    def client_left(self) -> None:
        """Nobody waits for the reply any more."""
        ...

    def client_slow(self, *, slow: bool) -> None:
        """The client takes less than comes, or takes again what comes."""
        ...


class Front(Protocol):
    """What every connection asks. budget: bytes of bodies that are held by all of them."""

    budget: BodyBudget
    connections: set[ClientConnection]

    def admit(self, request: ClientRequest) -> int:
        """The most bytes that the body of a request may have, of which the head is known. Raises
        the typed error that it is refused with."""
        ...

    def handle(self, request: ClientRequest, connection: ClientConnection) -> Handler | None:
        """Begin to answer; None where the reply was made at once."""
        ...


class HeadTooLarge(InvalidRequest):
    """The headers of a request are longer than any client's."""

    status = 431


class ClientConnection(asyncio.Protocol):
    """Reads requests with httptools, in order; a request is handled once its body is whole, and the
    next one when it was answered."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[ClientRequest] = deque()
        self._handler: Handler | None = None
        self._busy: ClientRequest | None = None
        self._reading: ClientRequest | None = None
        self._parts: list[bytes] = []
        self._url = b""
        self._headers: list[messages.Header] = []
        self._num_head = 0
        self._num_read = 0
        self._num_body = 0
        self._limit = 0
        self._deaf = False
        self._chunked = False
        self._awaited = False
        self._since = 0.0

    # The transport's calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._front.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._front.connections.discard(self)
        self._deaf = True
        self._drop_body()
        for request in self._waiting:
            self._front.budget.give_back(len(request.body))
        self._waiting.clear()
        self._transport = None
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.client_left()
        self._finished()

    def pause_writing(self) -> None:
        if self._handler is not None:
            self._handler.client_slow(slow=True)

    def resume_writing(self) -> None:
        if self._handler is not None:
            self._handler.client_slow(slow=False)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._reading is None:
            self._num_head += len(data)
        try:
            self._parser.feed_data(data)
            if self._reading is None and self._num_head > _MAX_HEAD_BYTES:
                raise _head_too_large()
        except httptools.HttpParserUpgrade:
            # The request is answered as any other; nothing that follows it is read.
            self._deaf = True
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, SlipstreamError):
                raise
            self._refuse(cause)
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"this is no request of HTTP/1.1: {error}", field="body"))
        except SlipstreamError as error:
            self._refuse(error)

    # The parser's calls.

    def on_message_begin(self) -> None:
        self._since = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_read += len(name) + len(value)
        if self._num_read > _MAX_HEAD_BYTES:
            raise _head_too_large()
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        method = self._parser.get_method().decode("latin-1")
        authority, target = messages.origin_form(self._url)
        headers = self._headers
        if authority:
            headers = [pair for pair in headers if pair[0] != b"host"] + [(b"host", authority)]
        path = target.partition(b"?")[0]
        plain = (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1")
        http11 = self._parser.get_http_version() == "1.1"
        request = ClientRequest(
            method=method,
            target=target,
            path=plain,
            headers=headers,
            keep_alive=self._parser.should_keep_alive(),
            chunks=http11,
        )
        request.take_id()
        self._url, self._headers, self._num_head, self._num_read = b"", [], 0, 0
        self._reading = request
        self._limit = self._front.admit(request)
        announced = request.header(b"content-length")
        if announced.isdigit() and int(announced[:18]) > self._limit:
            raise self._too_large(int(announced[:18]))
        if http11 and request.header(b"expect").lower() == b"100-continue":
            # Behind the reply that is on its way, if there is one.
            self._awaited = True
            self._ask_for_body()

    def on_body(self, body: bytes) -> None:
        count, self._awaited = len(body), False
        if self._num_body + count > self._limit:
            raise self._too_large(self._num_body + count)
        self._front.budget.check(count, small=self._num_body + count <= 1 << 20)
        self._front.budget.take(count)
        self._num_body += count
        self._parts.append(body)

    def on_message_complete(self) -> None:
        request = self._reading
        assert request is not None, "the head came first"
        parts = self._parts
        request.body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._reading, self._parts, self._num_body, self._since = None, [], 0, 0.0
        if self._busy is None:
            self._handle(request)
        else:
            self._waiting.append(request)
            if len(self._waiting) >= _MOST_WAITING and self._transport is not None:
                self._transport.pause_reading()

    # What handlers call.

    def reply(self, reply: Reply) -> None:
        """Answer the request with a whole reply."""
        request = self._busy
        if request is None:
            return
        head = messages.reply_head(
            reply.status,
            request.answered(reply.headers),
            length=len(reply.body),
            keep_alive=request.keep_alive and not self._deaf,
        )
        self._write(head if request.method == "HEAD" else head + reply.body)
        self._done()

    def begin_stream(self, status: int, headers: Pairs) -> None:
        """Begin a reply that comes in pieces."""
        request = self._busy
        if request is not None:
            request.keep_alive = request.keep_alive and request.chunks
            # As it begins so it goes on, whatever becomes of the connection meanwhile.
            self._chunked = keep = request.keep_alive
            headers = request.answered(headers)
            self._write(messages.reply_head(status, headers, length=None, keep_alive=keep))

    def send_piece(self, data: bytes) -> None:
        """A piece of it."""
        request = self._busy
        if request is not None and data:
            self._write(messages.chunk(data) if self._chunked else data)

    def end_stream(self) -> None:
        """No more pieces come."""
        request = self._busy
        if request is None:
            return
        if self._chunked:
            self._write(messages.LAST_CHUNK)
        self._done()

    def abort(self) -> None:
        """End the connection in the middle of a reply, so that nobody takes it for whole."""
        if self._transport is not None:
            self._transport.abort()

    # What the front calls.

    def too_late(self, now: float, patience_s: float) -> None:
        """End a connection whose request has not arrived within `patience_s`, and a second for each
        MiB of it."""
        since = self._since
        if since and not self._busy and now - since > patience_s + self._num_body / (1 << 20):
            self._refuse(BodyTimeout("the request did not arrive in time", field="body"))

    def leave(self) -> None:
        """Close now, or once what is open was answered."""
        if self._busy is not None:
            self._busy.keep_alive = False
        elif self._transport is not None:
            self._transport.close()

    def _ask_for_body(self) -> None:
        if self._awaited and self._busy is None:
            self._awaited = False
            self._write(messages.CONTINUE)

    def _handle(self, request: ClientRequest) -> None:
        self._busy = request
        self._handler = None
        handler = self._front.handle(request, self)
        # A reply that was made at once has freed the connection already.
        if self._busy is request:
            self._handler = handler

    def _finished(self) -> None:
        request, self._busy = self._busy, None
        if request is not None:
            self._front.budget.give_back(len(request.body))

    def _done(self) -> None:
        request = self._busy
        assert request is not None
        self._handler = None
        self._finished()
        if self._transport is None:
            return
        if not request.keep_alive or self._deaf:
            self._deaf = True
            self._transport.close()
        elif self._waiting:
            following = self._waiting.popleft()
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self._handle, following)
            self._busy = following
        elif self._since:
            # What follows has its time from now on.
            self._since = time.monotonic()
            self._ask_for_body()

    def _refuse(self, error: SlipstreamError) -> None:
        """Answer what cannot be read any further, and close."""
        path = "" if self._reading is None else self._reading.path
        self._drop_body()
        self._deaf = True
        if self._busy is not None:
            # Its reply is on the way: whoever sends nonsense behind it is told no more.
            self._busy.keep_alive = False
            return
        found = messages.error_reply(error, path)
        self._write(
            messages.reply_head(
                found.status, found.headers, length=len(found.body), keep_alive=False
            )
            + found.body
        )
        if self._transport is not None:
            self._transport.close()

    def _drop_body(self) -> None:
        self._front.budget.give_back(self._num_body)
        self._reading, self._parts, self._num_body, self._since = None, [], 0, 0.0

    def _too_large(self, count: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body has {count} bytes, more than {self._limit}; send less, or start the router "
            "with a larger --max-body-mib",
            field="body",
        )

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"the headers have more than {_MAX_HEAD_BYTES} bytes; send fewer", field="headers"
    )
