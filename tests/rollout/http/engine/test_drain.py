"""A server that is told to leave: what runs has time, what comes is refused with when to ask."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from rollout.http.engine import drain
from tests.helpers.http_app import Server, run, serving, until

LONG = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}


async def running(server: Server) -> asyncio.Task[httpx.Response]:
    """A request that the engine has and does not step."""
    server.link.stalled = True
    task = asyncio.create_task(server.post("/generate", LONG))
    await until(lambda: server.engine.num_open == 1)
    return task


def test_open_requests_finish_and_new_ones_are_told_when_to_come_again() -> None:
    async def test() -> None:
        async with serving() as server:
            task = await running(server)
            draining = asyncio.create_task(server.engine.drain.run(server.engine, 20.0))
            await until(lambda: server.engine.drain.began)
            for path, body in (
                ("/generate", LONG),
                ("/v1/completions", {"prompt": [1]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ):
                refused = await server.post(path, body)
                assert refused.status_code == 503, path
                assert refused.json()["error"]["type"] == "Draining"
                assert 1 <= int(refused.headers["retry-after"]) <= 20
            assert not draining.done()
            server.link.stalled = False
            server.link.post([])
            assert len((await task).json()["output_ids"]) == 200
            await draining

    run(test)


def test_health_says_so_and_liveness_is_still_well() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.engine.drain.run(server.engine, 5.0)
            for path in ("/health", "/ping", "/ready"):
                reply = await server.get(path)
                assert (reply.status_code, reply.json()["error"]["type"]) == (503, "Draining")
            alive = await server.get("/liveness")
            assert (alive.status_code, alive.json()) == (200, {"status": "draining"})
            assert (await server.get("/metrics")).status_code == 200

    run(test)


def test_it_ends_with_its_time_and_soon_once_the_engine_stays_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drain, "_PAUSED_S", 0.3)

    async def test() -> None:
        async with serving() as server:
            task = await running(server)
            await server.engine.drain.run(server.engine, 0.1)
            assert not task.done()
            await server.post("/pause_generation", {"mode": "in_place"})
            await asyncio.wait_for(server.engine.drain.run(server.engine, 60.0), 20)
            await server.engine.leave(5.0)
            assert (await task).status_code == 503

    run(test)


def test_requests_of_a_pause_that_ends_meanwhile_finish() -> None:
    async def test() -> None:
        async with serving() as server:
            task = await running(server)
            await server.post("/pause_generation", {"mode": "in_place"})
            draining = asyncio.create_task(server.engine.drain.run(server.engine, 20.0))
            await asyncio.sleep(0.2)
            assert not draining.done()
            server.link.stalled = False
            await server.post("/continue_generation", {})
            assert len((await task).json()["output_ids"]) == 200
            await draining

    run(test)
