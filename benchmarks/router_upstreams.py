"""Two workers for `benchmarks/router.py` that cost next to nothing: they send one reply, always.

    python benchmarks/router_upstreams.py

Prints the ports of both. A request with a ticket gets the reply in the frames of a journal, with
one record; `/server_info`, `/health` and the like get what a router asks for.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import checkout  # noqa: F401
import httptools
import uvloop

from rollout.http.journal import frames

_REPLY = json.dumps({"text": "x" * 40, "output_ids": list(range(16)), "meta_info": {}}).encode()
_INFO = json.dumps({"served_model_name": "mock", "model_path": "mock", "weight_version": "0"})


def _whole(body: bytes, kind: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return head % (kind, len(body)) + body


_JSON = b"application/json"
_PLAIN = _whole(_REPLY, _JSON)
_FACTS = _whole(_INFO.encode(), _JSON)
_HEAD = json.dumps([200, [["content-type", "application/json"]]]).encode()
_FRAMED = _whole(
    frames.frame(frames.VERSION, b"0")
    + frames.frame(frames.RECORD, b"\x90" * 200)
    + frames.frame(frames.HEAD, _HEAD)
    + frames.frame(frames.PIECE, _REPLY)
    + frames.frame(frames.END),
    frames.CONTENT_TYPE,
)


class _Worker(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._ticket = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._ticket = url, False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._ticket = self._ticket or name.lower() == frames.HEADER

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if self._url.startswith(b"/generate"):
            self._transport.write(_FRAMED if self._ticket else _PLAIN)
        else:
            self._transport.write(_FACTS)


async def main() -> None:
    """Listen until told to stop."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Worker, "127.0.0.1", 0) for _ in range(2)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    print("port", *ports, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
