"""The pause that waits: what ends it, what it refuses, and where requests go meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from engine.errors import PauseCancelled
from engine.protocol import Pause, Resume
from rollout.http.updates.idle_pause import IdlePause
from tests.helpers.control_calls import kinds
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, run, serving, until

LONG = {"input_ids": [1], "sampling_params": {"max_new_tokens": 400}}
SHORT = {"input_ids": [1], "sampling_params": {"max_new_tokens": 3}}


@asynccontextmanager
async def waiting(server: Server) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A pause that waits for a request that does not finish: the engine does not step."""
    server.link.stalled = True
    request = asyncio.create_task(server.post("/generate", LONG))
    await until(lambda: server.engine.num_open == 1)
    pause = asyncio.create_task(server.post("/pause?mode=wait"))
    await until(lambda: server.engine.num_open == 1 and server.engine.outbox.holds)
    try:
        yield pause
    finally:
        server.link.stalled = False
        await server.post("/resume")
        await request


@pytest.mark.parametrize("path", ["/resume", "/continue_generation", "/wake_up"])
def test_a_resume_ends_the_wait_and_sends_what_came_meanwhile(path: str) -> None:
    async def test() -> None:
        async with serving() as server, waiting(server) as pause:
            second = asyncio.create_task(server.post("/generate", SHORT))
            await until(lambda: bool(server.engine.outbox))
            assert (await asyncio.wait_for(server.post(path), 30)).status_code == 200
            reply = await pause
            assert (reply.status_code, reply.json()["error"]["type"]) == (409, "PauseCancelled")
            assert "resume" in reply.json()["error"]["message"]
            server.link.stalled = False
            assert (await second).json()["output_ids"] == expected_tokens([1], 3)
            assert Pause not in kinds(server)

    run(test)


@pytest.mark.parametrize("path", ["/pause?mode=keep", "/pause_generation"])
def test_another_pause_ends_the_wait_and_holds_what_came_meanwhile(path: str) -> None:
    async def test() -> None:
        async with serving() as server, waiting(server) as pause:
            second = asyncio.create_task(server.post("/generate", SHORT))
            await until(lambda: bool(server.engine.outbox))
            assert (await server.post(path)).status_code == 200
            assert (await pause).json()["error"]["type"] == "PauseCancelled"
            server.link.stalled = False
            await until(lambda: len(server.link.requests) == 2)
            assert not second.done()
            await server.post("/resume")
            assert (await second).json()["output_ids"] == expected_tokens([1], 3)

    run(test)


def test_a_second_wait_takes_over_from_the_first() -> None:
    async def test() -> None:
        async with serving() as server, waiting(server) as pause:
            second = asyncio.create_task(server.post("/pause?mode=wait"))
            assert (await pause).json()["error"]["type"] == "PauseCancelled"
            assert server.engine.outbox.holds
            server.link.stalled = False
            assert (await second).status_code == 200
            assert (await server.get("/is_paused")).json() == {"is_paused": True}

    run(test)


def test_requests_that_are_paused_already_cannot_be_waited_for() -> None:
    async def test() -> None:
        async with serving() as server:
            request = asyncio.create_task(server.post("/generate", LONG))
            await until(lambda: server.link.leader.state().num_running == 1)
            await server.post("/pause?mode=keep")
            reply = await asyncio.wait_for(server.post("/pause?mode=wait"), 30)
            error = reply.json()["error"]
            assert (reply.status_code, error["field"]) == (400, "mode")
            assert "1 requests" in error["message"]
            await server.post("/resume")
            assert len((await request).json()["output_ids"]) == 400

    run(test)


def test_a_wait_while_nothing_runs_any_more_is_over_at_once() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation")
            queued = asyncio.create_task(server.post("/generate", SHORT))
            await until(lambda: len(server.link.requests) == 1)
            assert (await asyncio.wait_for(server.post("/pause?mode=wait"), 30)).status_code == 200
            await server.post("/resume")
            assert (await queued).status_code == 200

    run(test)


def test_a_wait_has_an_end() -> None:
    async def test() -> None:
        async with serving() as server, waiting(server) as pause:
            reply = await server.post("/pause?mode=wait&timeout_s=0.1")
            assert (reply.status_code, reply.json()["error"]["type"]) == (408, "UpdateTimeout")
            assert (await pause).json()["error"]["type"] == "PauseCancelled"
            assert not server.engine.outbox.holds
            for bad in ("nan", "inf", "-1", "1e308"):
                reply = await server.post(f"/pause?mode=wait&timeout_s={bad}")
                assert (reply.status_code, reply.json()["error"]["field"]) == (400, "timeout_s")

    run(test)


def test_a_client_that_leaves_ends_its_wait() -> None:
    async def test() -> None:
        async with serving() as server, waiting(server) as pause:
            pause.cancel()
            await until(lambda: not server.engine.outbox.holds)
            server.link.stalled = False
            await until(lambda: server.engine.num_open == 0)
            assert kinds(server) == []

    run(test)


def test_cancelled_by_name() -> None:
    async def test() -> None:
        async with serving() as server, waiting(server) as pause:
            other = IdlePause(server.engine)
            task = asyncio.create_task(other.pause(60))
            await until(lambda: other.waiting)
            other.cancel("a restart of the engine")
            with pytest.raises(PauseCancelled, match="a restart"):
                await task
            await server.post("/resume")
            await pause
            assert kinds(server) == [Resume]

    run(test)
