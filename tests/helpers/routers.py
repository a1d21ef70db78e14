"""A router in this process, and workers behind it whose replies a test writes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from rollout.router.app import Router
from rollout.router.config import RouterConfig
from rollout.router.wire.client_connection import ClientConnection

PATIENCE_S = 20.0

Write = Callable[[bytes], None]
Answer = Callable[["Seen", "Line"], Awaitable[None]]


@dataclass
class Seen:
    """A request as a worker got it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Line:
    """A worker's connection, to answer on."""

    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        """Some bytes."""
        self.writer.write(data)

    def reply(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
        """A whole reply."""
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    def cut(self) -> None:
        """End the connection as a killed process does."""
        self.writer.transport.abort()


@dataclass
class FakeWorker:
    """A server that answers `/server_info` and `/health` by itself, the rest by `answer`."""

    answer: Answer | None = None
    version: str = "0"
    model: str = "fake"
    refusal: str = ""
    well: bool = True
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    server: asyncio.Server | None = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self, port: int = 0) -> None:
        """Listen."""
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Die: nobody listens, and what is open is cut."""
        if self.server is not None:
            self.server.close()
            for writer in list(self.writers):
                writer.transport.abort()
            await self.server.wait_closed()
            self.server = None

    @property
    def port(self) -> int:
        """Where it listens, or did."""
        return int(self.url.rpartition(":")[2])

    def calls(self, path: str) -> list[Seen]:
        """What came for a path."""
        return [seen for seen in self.seen if seen.target.partition("?")[0] == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while (seen := await _read(reader)) is not None:
                await self._answer(seen, Line(writer))
                await writer.drain()
                if seen.headers.get("connection") == "close":
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _answer(self, seen: Seen, line: Line) -> None:
        if seen.target == "/server_info":
            line.reply(json.dumps(self._info()).encode())
            return
        if seen.target == "/liveness":
            line.reply(b'{"status":"ok"}', 200 if self.well else 503)
            return
        self.seen.append(seen)
        if self.answer is None:
            line.reply(json.dumps({"worker": self.url, "body": seen.body.decode()}).encode())
        else:
            await self.answer(seen, line)

    def _info(self) -> dict[str, Any]:
        return {
            "served_model_name": self.model,
            "weight_version": self.version,
            "tp_size": 1,
            "num_gpus": 1,
            "internal_states": [{"refusal": self.refusal}],
        }


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.split(": ", 1) for line in lines)
    headers = {name.lower(): value for name, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(method, target, headers, body)


@dataclass
class Routed:
    """A running router. http: a client of it."""

    router: Router
    http: httpx.AsyncClient
    url: str

    async def until(self, true: Callable[[], object]) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                await asyncio.sleep(0.005)

    async def until_ready(self, count: int) -> None:
        """Wait until so many workers may be asked."""
        await self.until(lambda: len(self.router.fleet.rotation()) == count)


@asynccontextmanager
async def routing(*workers: FakeWorker, **options: Any) -> AsyncIterator[Routed]:
    """A router of these workers, which are started where they are not; all of them joined."""
    for worker in workers:
        if worker.server is None:
            await worker.start()
    urls = tuple(worker.url for worker in workers)
    options.setdefault("policy", "round_robin")
    router = Router(RouterConfig(workers=urls, **options))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ClientConnection(router), "127.0.0.1", 0)
    ticking = asyncio.create_task(_tick(router))
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
            routed = Routed(router, http, url)
            await routed.until_ready(len(workers))
            yield routed
    finally:
        ticking.cancel()
        server.close()
        await router.close(0.0)
        for worker in workers:
            await worker.stop()


async def _tick(router: Router) -> None:
    while True:
        await asyncio.sleep(0.1)
        router.tick(time.monotonic())


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an asynchronous test."""

    async def limited() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await test()

    asyncio.run(limited())
