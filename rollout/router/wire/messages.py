"""Requests and replies between their two connections, and how heads are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from engine.errors import InvalidRequest, SlipstreamError
from rollout.http.edge.errors import error_response
from rollout.logs.request_id import HEADER, request_id_of

Header = tuple[bytes, bytes]
Pairs = Sequence[Header]

# Of one connection, not of the message; a router states its own.
_OF_CONNECTION = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"),
        *(b"transfer-encoding", b"content-length", b"host", b"expect"),
    }
)
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class ClientRequest:
    """One request as it came. target: path and query, as the bytes that they were. path: the
    path alone. headers: names in lower case. body: whole."""

    method: str
    target: bytes
    path: str
    headers: list[Header]
    body: bytes = b""
    keep_alive: bool = True
    chunks: bool = True

    def take_id(self) -> None:
        """Have an id, the client's or one that is drawn, which the worker and the log get too."""
        given = self.header(HEADER)
        name = request_id_of(given).encode("ascii")
        if name != given:
            self.headers = [*(pair for pair in self.headers if pair[0] != HEADER), (HEADER, name)]

    def answered(self, headers: Iterable[Header]) -> list[Header]:
        """The headers of a reply, with the id of the request."""
        own = (HEADER, self.header(HEADER))
        return [*(pair for pair in headers if pair[0] != HEADER), own]

    def header(self, name: bytes) -> bytes:
        """The first value of a header; b"" without one."""
        for known, value in self.headers:
            if known == name:
                return value
        return b""


@dataclass(slots=True)
class Reply:
    """A whole reply, in memory."""

    status: int
    headers: list[Header] = field(default_factory=list)
    body: bytes = b""


def origin_form(target: bytes) -> tuple[bytes, bytes]:
    """(address, path and query) of a request's target. A server answers what is sent to a proxy by
    its path (RFC 9112, 3.2.2), so that is what a router goes by too; address: of such a target,
    which takes the place of the header Host; else b"". A slash at the end of a path says nothing,
    where a worker would send its client to its own address for it.

    Raises InvalidRequest (`target`) for one that names no path, or has a fragment.
    """
    authority = b""
    scheme, mark, rest = target.partition(b"://")
    if mark and scheme.lower() in (b"http", b"https"):
        end = min(at for at in (rest.find(b"/"), rest.find(b"?"), len(rest)) if at >= 0)
        authority, target = rest[:end], rest[end:]
        target = target if target.startswith(b"/") else b"/" + target
    if not target.startswith(b"/") or b"#" in target:
        raise InvalidRequest(
            f"{target[:200].decode('latin-1')!r} names no path of this router; ask for one such "
            "as /generate",
            field="target",
        )
    path, mark, query = target.partition(b"?")
    return authority, (path.rstrip(b"/") or b"/") + mark + query


def json_reply(body: bytes, status: int = 200) -> Reply:
    """A reply that is JSON already."""
    return Reply(status, [(b"content-type", b"application/json")], body)


def error_reply(error: SlipstreamError, path: str = "") -> Reply:
    """The error in the form of the dialect that `path` is of."""
    return json_reply(bytes(error_response(error, path).body), error.status)


def request_head(
    method: str, target: bytes, host: bytes, headers: Iterable[Header], length: int
) -> bytes:
    """The head of a request to a worker: what the client's says, but for its connection."""
    parts = [method.encode(), b" ", target, b" HTTP/1.1\r\nhost: ", host]
    for name, value in headers:
        if name not in _OF_CONNECTION:
            parts += (b"\r\n", name, b": ", value)
    parts.append(b"\r\ncontent-length: %d\r\n\r\n" % length)
    return b"".join(parts)


def reply_head(
    status: int, headers: Iterable[Header], *, length: int | None, keep_alive: bool
) -> bytes:
    """The head of a reply to a client. length: of the body; None for one in chunks, or, without
    `keep_alive`, one that ends with the connection."""
    parts = [b"HTTP/1.1 %d " % status, _REASONS.get(status, b"")]
    for name, value in headers:
        if name not in _OF_CONNECTION:
            parts += (b"\r\n", name, b": ", value)
    if length is not None:
        parts.append(b"\r\ncontent-length: %d" % length)
    elif keep_alive:
        parts.append(b"\r\ntransfer-encoding: chunked")
    if not keep_alive:
        parts.append(b"\r\nconnection: close")
    parts.append(b"\r\n\r\n")
    return b"".join(parts)


def chunk(data: bytes) -> bytes:
    """One chunk of a body whose length is not known beforehand."""
    return b"%x\r\n%b\r\n" % (len(data), data)
