"""What no client and no worker should send, from outside, to a router of its own process."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from rollout.http.journal import frames
from rollout.http.journal.frames import Head, frame
from tests.helpers.router_process import router_process
from tests.helpers.routers import PATIENCE_S, FakeWorker, Line, Seen, run
from tests.helpers.serve_process import ServerProcess

MIB = 1 << 20
OPTIONS = f"max_body_bytes={MIB}, receive_timeout_s=1.0, patience_s=0.5, policy='round_robin'"


@pytest.fixture(scope="module")
def router() -> Iterator[ServerProcess]:
    with router_process(OPTIONS) as process:
        yield process


@pytest.fixture(autouse=True)
def _empty(router: ServerProcess) -> Iterator[None]:
    yield
    for url in httpx.get(f"{router.url}/list_workers").json()["urls"]:
        httpx.post(f"{router.url}/remove_worker?url={url}")


def rss(process: ServerProcess) -> int:
    text = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) << 10


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


async def join(url: str, *workers: FakeWorker) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        for worker in workers:
            if worker.server is None:
                await worker.start()
            await http.post("/workers", json={"url": worker.url})
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = (await http.get("/workers")).json()["stats"]["healthy_workers"]
                if found == len(workers):
                    return
                await asyncio.sleep(0.01)


async def ask(url: str, body: bytes = b'{"text": "a"}') -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        headers = {"content-type": "application/json"}
        return await http.post("/generate", content=body, headers=headers)


def framed(line: Line, *parts: bytes) -> None:
    data = b"".join(parts)
    head = "HTTP/1.1 200 OK\r\ncontent-type: application/vnd.slipstream.journal\r\n"
    line.send(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)


async def of_another(seen: Seen, line: Line) -> None:
    """A journal that is whole, of another request."""
    head = msgspec.json.encode(Head(200, [("content-type", "application/json")]))
    parts = [frame(frames.TICKET, b"f" * 32), frame(frames.HEAD, head)]
    framed(line, *parts, frame(frames.PIECE, b'{"stale":1}'), frame(frames.END))


def test_the_journal_of_another_request_is_never_given_to_a_client(router: ServerProcess) -> None:
    async def test() -> None:
        liar, honest = FakeWorker(of_another), FakeWorker()
        await join(router.url, liar, honest)
        for _ in range(4):
            assert (await ask(router.url)).json()["worker"] == honest.url
        await honest.stop()
        # All that is left is the liar: an error of its type, and nothing of what it said.
        reply = await ask(router.url)
        assert (reply.status_code, "stale" in reply.text) == (503, False)
        assert reply.json()["error"]["type"] in ("WorkerLost", "NoWorker")
        await liar.stop()

    run(test)


def test_a_router_is_no_worker_of_itself_nor_of_another(router: ServerProcess) -> None:
    async def test() -> None:
        worker = FakeWorker()
        await join(router.url, worker)
        with router_process(OPTIONS) as second:
            # The second asks the first, which has a worker, and the first itself.
            for asked, url in ((second, router.url), (router, router.url), (router, second.url)):
                httpx.post(f"{asked.url}/workers", json={"url": url})
                deadline = time.monotonic() + PATIENCE_S
                while True:
                    found = httpx.get(f"{asked.url}/workers").json()["workers"]
                    (state,) = [one["metadata"]["state"] for one in found if one["url"] == url]
                    if "register its servers" in state:
                        break
                    assert time.monotonic() < deadline, state
                    await asyncio.sleep(0.02)
            assert (await ask(second.url)).status_code == 503
            assert (await ask(router.url)).json()["worker"] == worker.url
        await worker.stop()

    run(test)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_a_gibibyte_is_refused_before_it_is_held(
    router: ServerProcess, chunked: bool
) -> None:
    before = rss(router)
    with socket.create_connection(address(router.url), timeout=PATIENCE_S) as client:
        head = "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        size = "transfer-encoding: chunked" if chunked else f"content-length: {1 << 30}"
        client.sendall(f"{head}{size}\r\n\r\n".encode())
        piece = b"x" * MIB
        sent = 0
        try:
            while chunked and sent < 1 << 30:
                client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                sent += len(piece)
        except OSError:
            pass
        try:
            reply = client.recv(1 << 16)
            assert reply.startswith(b"HTTP/1.1 413 ")
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "BodyTooLarge"
        except ConnectionResetError:
            # What the client still sent when it was refused came before the answer was read.
            assert chunked
    assert sent < 64 * MIB
    assert rss(router) - before < 32 * MIB


def test_clients_that_send_nothing_or_too_slowly_are_ended_and_cost_little(
    router: ServerProcess,
) -> None:
    async def test() -> None:
        worker = FakeWorker()
        await join(router.url, worker)
        await ask(router.url)
        before = rss(router)
        host, port = address(router.url)
        idle = [await asyncio.open_connection(host, port) for _ in range(1000)]
        slow = [await asyncio.open_connection(host, port) for _ in range(50)]
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{"
        for number, (_, writer) in enumerate(slow):
            # Half of them never end their headers, half their body.
            writer.write(head if number % 2 else head[:40])
        assert (await ask(router.url)).json()["worker"] == worker.url
        assert rss(router) - before < 32 * MIB
        start = time.monotonic()
        for reader, writer in slow:
            reply = await reader.read()
            assert reply.startswith(b"HTTP/1.1 408 "), reply
            writer.close()
        assert time.monotonic() - start < 10
        # A connection that has asked for nothing yet may stay.
        reader, writer = idle[-1]
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        for _, writer in idle:
            writer.close()
        await worker.stop()

    run(test)


def test_a_client_that_closes_its_half_or_resets_takes_its_request_along(
    router: ServerProcess,
) -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def held(seen: Seen, line: Line) -> None:
            await release.wait()
            line.reply(b'{"late":1}')

        worker = FakeWorker(held)
        await join(router.url, worker)
        host, port = address(router.url)
        request = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
        reader, half = await asyncio.open_connection(host, port)
        half.write(request)
        _, reset = await asyncio.open_connection(host, port)
        reset.write(request)
        async with asyncio.timeout(PATIENCE_S):
            while len(worker.seen) < 2:
                await asyncio.sleep(0.01)
            half.write_eof()
            reset.transport.abort()
            await asyncio.sleep(0.05)
            assert await reader.read() == b""
            while httpx.get(f"{router.url}/workers").json()["stats"]["total_load"]:
                await asyncio.sleep(0.01)
        release.set()
        half.close()
        await worker.stop()

    run(test)
