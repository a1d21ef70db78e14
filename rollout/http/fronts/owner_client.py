"""A front's calls to the owner of the engine: HTTP over a socket of the file system."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import httpx
import msgspec
from starlette.types import Message, Receive, Scope, Send

from engine.errors import EngineDead
from rollout.http.edge.errors import error_response
from rollout.http.edge.sse import ClientGone, until_gone
from rollout.metrics import FinishedSequence

CALLER = b"x-slipstream-caller"
"""Header by which a front says whose request it passes on, in each that it does; a client's own is
dropped."""
REPORT = "/-/front"
"""Where fronts report; no route of the server, and not reached from outside."""

# Of one connection, not of the message; and what the front's server adds by itself.
_DROPPED = frozenset(
    {b"transfer-encoding", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"}
)
_OF_REPLIES = _DROPPED | {b"date", b"server"}
_CONNECT_S = 10.0
_IDLE_S = 30.0
_NUM_IDLE = 64


class FrontReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a front says about once a second, and that it is alive. name: its own; finished: the
    sequences that ended since the last report."""

    name: str
    finished: list[FinishedSequence]


class OwnerClient:
    """Connections to the owner. socket: the path where it listens."""

    def __init__(self, socket: str) -> None:
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=_NUM_IDLE, keepalive_expiry=_IDLE_S
        )
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=limits),
            # How long an answer may take the owner knows.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            trust_env=False,
        )

    async def report(self, report: FrontReport) -> None:
        """Send a report. Raises httpx.HTTPError while the owner takes none."""
        body = msgspec.json.encode(report)
        await self._client.post(f"http://owner{REPORT}", content=body)

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on as it comes, and the reply to it. A client that leaves closes the
        connection to the owner, which learns of it as if it were its own."""
        body = _Body(receive)
        try:
            await until_gone(self._pass_on(scope, body, send), body.rest)
        except ClientGone:
            return

    async def close(self) -> None:
        """Close what is idle."""
        await self._client.aclose()

    async def _pass_on(self, scope: Scope, body: _Body, send: Send) -> None:
        has_body = _announces_body(scope["headers"])
        request = httpx.Request(
            scope["method"],
            "http://owner/",
            headers=_headers(scope),
            content=body.parts() if has_body else None,
            # As it came: a URL of httpx would take "/a/../b" for "/b".
            extensions={"target": _target(scope)},
        )
        if not has_body:
            body.ended()
        try:
            reply = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            gone = EngineDead(f"the owner of the engine does not answer: {error}", field="server")
            await error_response(gone)(scope, body.rest, send)
            return
        try:
            headers = [(k.lower(), v) for k, v in reply.headers.raw]
            headers = [(k, v) for k, v in headers if k not in _OF_REPLIES]
            start = {"status": reply.status_code, "headers": headers}
            await send({"type": "http.response.start", **start})
            async for part in reply.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        finally:
            await reply.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Body:
    """The body of a request, read by whoever passes it on; `rest` is what may be read behind it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = asyncio.Event()

    def ended(self) -> None:
        """No more of it comes."""
        self._ended.set()

    async def parts(self) -> AsyncIterator[bytes]:
        """Its parts, as they come."""
        try:
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                more = message.get("more_body", False)
                yield message.get("body", b"")
        finally:
            self.ended()

    async def rest(self) -> Message:
        """The `receive` of the ASGI protocol, once the body has ended."""
        await self._ended.wait()
        return await self._receive()


def _announces_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in headers
    )


def _target(scope: Scope) -> bytes:
    query: bytes = scope["query_string"]
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path + b"?" + query if query else path


def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    dropped = _DROPPED | {CALLER, b"connection", b"expect"}
    headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
    client = scope.get("client")
    headers.append((CALLER, b"" if client is None else str(client[0]).encode()))
    return headers
