"""Requests that are written to get past a router's door, and clients that leave at bad times."""

import asyncio
from unittest.mock import MagicMock

import httpx
import pytest

from rollout.http import app
from rollout.http.edge import unserved_routes
from rollout.router.choice.ask import NOTHING
from rollout.router.exchange import Exchange
from rollout.router.routes import Kind, kind_of, steers
from rollout.router.wire.messages import ClientRequest
from tests.helpers.routers import PATIENCE_S, FakeWorker, Line, Routed, Seen, routing, run


async def said(routed: Routed, head: str) -> bytes:
    """What a raw request gets, the connection closed behind it."""
    reader, writer = await opened(routed)
    writer.write(f"{head}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
    async with asyncio.timeout(PATIENCE_S):
        found = await reader.read()
    writer.close()
    return found


@pytest.mark.parametrize(
    "target, status",
    [
        ("http://localhost/flush_cache", 401),
        ("http://localhost/flush%5fcache?a=1", 401),
        ("/flush_cache#a", 400),
        ("localhost:80/flush_cache", 400),
        ("/internal/commit_update", 404),
        ("/internal/resume", 404),
        ("http://localhost/internal/drop%5fupdate", 404),
    ],
)
def test_no_way_of_writing_a_target_gets_past_the_admin_key(target: str, status: int) -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker, admin_api_key="k") as routed:
            reply = await said(routed, f"POST {target} HTTP/1.1\r\nhost: localhost")
            assert reply.startswith(b"HTTP/1.1 %d " % status), reply
            assert not worker.seen

    run(test)


def test_a_target_with_an_address_is_answered_by_its_path() -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker) as routed:
            head = "GET http://localhost:1/v1/models?a=b HTTP/1.1\r\nhost: other"
            assert (await said(routed, head)).startswith(b"HTTP/1.1 200 ")
            assert worker.seen[0].target == "/v1/models?a=b"
            # Its address counts, and not the header beside it.
            head = "GET http://evil.example/v1/models HTTP/1.1\r\nhost: localhost"
            assert (await said(routed, head)).startswith(b"HTTP/1.1 403 ")

    run(test)


def test_a_slash_at_the_end_says_nothing() -> None:
    async def test() -> None:
        first, second = FakeWorker(), FakeWorker()
        async with routing(first, second) as routed:
            assert (await routed.http.post("/flush_cache/?a=/", json={})).status_code == 200
            for worker in (first, second):
                assert [seen.target for seen in worker.calls("/flush_cache")] == [
                    "/flush_cache?a=/"
                ]

    run(test)


def test_all_that_takes_the_admin_key_at_a_server_takes_it_here() -> None:
    services = MagicMock()
    routers = [module.router(services) for module in app._CONTROL]
    served = {route.path for router in routers for route in router.routes}
    assert served and unserved_routes.router().routes
    for path in served:
        assert steers(path) or kind_of(path) is Kind.PRIVATE, path


@pytest.mark.parametrize(
    "call",
    [
        "GET /workers/http%3A%2F%2F%5Bx",
        "DELETE /workers/%2F%2F%5B",
        "POST /workers/%5Bx/flush_cache",
        "POST /remove_worker?url=http://[x",
    ],
)
def test_a_name_that_is_no_url_is_an_unknown_worker(call: str) -> None:
    async def test() -> None:
        async with routing() as routed:
            reply = await said(routed, f"{call} HTTP/1.1\r\nhost: localhost")
            assert reply.startswith(b"HTTP/1.1 404 "), reply
            assert b"UnknownWorker" in reply

    run(test)


def test_a_router_that_is_told_to_leave_ends_its_streams_as_they_began() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def streamed(seen: Seen, line: Line) -> None:
            line.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
            line.send(b"transfer-encoding: chunked\r\n\r\n9\r\ndata: a\n\n\r\n")
            await release.wait()
            line.send(b"9\r\ndata: b\n\n\r\n0\r\n\r\n")

        worker = FakeWorker(streamed)
        async with routing(worker) as routed:
            body = {"text": "a", "stream": True}
            async with routed.http.stream("POST", "/generate", json=body) as reply:
                pieces = reply.aiter_raw()
                got = await anext(pieces)
                closing = asyncio.create_task(routed.router.close(PATIENCE_S))
                await asyncio.sleep(0.05)
                release.set()
                async for piece in pieces:
                    got += piece
            assert got == b"data: a\n\ndata: b\n\n"
            await closing

    run(test)


def test_a_client_that_leaves_the_one_try_leaves_the_worker_another() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def held(seen: Seen, line: Line) -> None:
            if seen.body:
                await release.wait()
            line.reply(b"{}")

        worker = FakeWorker(held)
        async with routing(worker) as routed:
            (known,) = routed.router.fleet
            for _ in range(3):
                known.breaker.failed()
            routed.router.fleet.touch()
            await routed.until(lambda: known.breaker.half_open)
            routed.router.fleet.touch()
            leaving = asyncio.create_task(routed.http.post("/generate", json={"text": "a"}))
            await routed.until(lambda: worker.seen)
            leaving.cancel()
            await routed.until(lambda: known.num_open == 0)
            release.set()
            await routed.until(lambda: known.in_rotation)
            assert (await routed.http.post("/generate", json={"text": "b"})).status_code == 200
            assert not known.breaker.half_open

    run(test)


def test_half_a_head_behind_a_whole_request_has_its_time_too() -> None:
    async def test() -> None:
        async with routing(FakeWorker(), receive_timeout_s=0.2) as routed:
            reader, writer = await opened(routed)
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea")
            async with asyncio.timeout(PATIENCE_S):
                found = await reader.read()
            assert (found.count(b"HTTP/1.1 200 "), found.count(b"HTTP/1.1 408 ")) == (1, 1)
            writer.close()

    run(test)


def test_a_body_that_waits_to_be_asked_for_is_asked_for_in_its_turn() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def held(seen: Seen, line: Line) -> None:
            await release.wait()
            line.reply(seen.body)

        worker = FakeWorker(held)
        async with routing(worker) as routed:
            reader, writer = await opened(routed)
            head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n"
            writer.write(head + b"\r\n{}" + head + b"expect: 100-continue\r\n\r\n")
            await routed.until(lambda: worker.seen)
            release.set()
            async with asyncio.timeout(PATIENCE_S):
                assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200 ")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
                writer.write(b"[]")
                assert (await reader.readuntil(b"[]")).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(test)


def test_a_client_that_reads_nothing_stops_the_next_worker_too() -> None:
    parts, connection = MagicMock(), MagicMock()
    parts.config.worker_api_key = ""
    request = ClientRequest("POST", b"/generate", "/generate", [])
    exchange = Exchange(parts, request, MagicMock(), ask=NOTHING)
    exchange._worker = MagicMock(prefix=b"", host=b"h")
    exchange.client_slow(slow=True)
    exchange._connected(connection, "")
    connection.pause.assert_called_once_with(paused=True)


def test_a_fault_of_the_routers_own_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async def fails(request: ClientRequest) -> None:
            raise RuntimeError("a fault")

        async with routing(FakeWorker()) as routed:
            monkeypatch.setattr(routed.router._fan_out, "run", fails)
            with pytest.raises(httpx.RemoteProtocolError):
                await routed.http.post("/flush_cache", json={})
            assert (await routed.http.post("/generate", json={})).status_code == 200

    run(test)


async def opened(routed: Routed) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = routed.url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))
