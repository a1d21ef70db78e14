"""Updates and control calls through a router, over servers of the fake engine: all or none."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from engine.errors import ManifestMismatch
from engine.protocol import CommitUpdate, LoadFromDisk, PrepareUpdate, Reply
from tests.helpers.control_calls import WholeModel, one
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.live_servers import Live, live
from tests.helpers.routers import Routed, routing, run

SAMPLING = {"max_new_tokens": 5, "ignore_eos": True}


def fleet(count: int, test: Callable[[Routed, list[Live]], Awaitable[None]]) -> None:
    async def within() -> None:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(live()) for _ in range(count)]
            routed = await stack.enter_async_context(routing())
            for server in servers:
                await routed.http.post("/workers", json={"url": server.url})
            await routed.until_ready(count)
            await test(routed, servers)

    run(within)


async def outputs(routed: Routed, count: int) -> list[list[int]]:
    body = {"input_ids": [1, 2], "sampling_params": SAMPLING}
    replies = await asyncio.gather(
        *(routed.http.post("/generate", json=body) for _ in range(count))
    )
    return [reply.json()["output_ids"] for reply in replies]


async def states(routed: Routed) -> dict[str, Any]:
    found = (await routed.http.get("/workers")).json()["workers"]
    return {one["url"]: (one["is_healthy"], one["metadata"]["state"]) for one in found}


def of(step: int) -> dict[str, Any]:
    return {"model_path": f"/weights/step_{step}", "weight_version": str(step)}


def refuse(_: Any) -> Reply:
    raise ManifestMismatch("a tensor is missing", field="x")


def commands(server: Live, kind: type) -> int:
    return sum(isinstance(command, kind) for command in server.server.link.commands)


def test_a_folder_is_loaded_and_verified_everywhere_and_then_committed() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        reply = await routed.http.post("/update_weights_from_disk", json=of(3))
        assert reply.status_code == 200, reply.text
        assert reply.json()["success"] is True
        assert set(reply.json()["workers"]) == {server.url for server in servers}
        assert await outputs(routed, 4) == [expected_tokens([1, 2], 5, shift=3)] * 4
        assert routed.router.fleet.version == "3"
        for server in servers:
            kinds = [type(command) for command in server.server.link.commands]
            assert kinds.index(PrepareUpdate) < kinds.index(CommitUpdate)

    fleet(2, test)


def test_one_that_cannot_load_leaves_all_of_them_as_they_were() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        for kind in (LoadFromDisk, PrepareUpdate):
            servers[1].server.link.answers[kind] = refuse
            reply = await routed.http.post("/update_weights_from_disk", json=of(3))
            assert reply.status_code >= 400
            assert servers[1].url in reply.json()["error"]["message"]
            assert "a tensor is missing" in reply.json()["error"]["message"]
            assert [commands(server, CommitUpdate) for server in servers] == [0, 0]
            assert await outputs(routed, 4) == [expected_tokens([1, 2], 5)] * 4
            del servers[1].server.link.answers[kind]
        reply = await routed.http.post("/update_weights_from_disk", json=of(4))
        assert reply.status_code == 200, reply.text

    fleet(2, test)


def test_one_that_does_not_commit_is_out_until_it_is_published_to() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        servers[1].server.link.answers[CommitUpdate] = refuse
        reply = await routed.http.post("/update_weights_from_disk", json=of(3))
        assert reply.status_code >= 400
        told = reply.json()
        assert told["workers"][servers[0].url]["success"] is True
        assert told["workers"][servers[1].url]["success"] is False
        healthy, why = (await states(routed))[servers[1].url]
        assert not healthy and "'3'" in why
        assert await outputs(routed, 3) == [expected_tokens([1, 2], 5, shift=3)] * 3
        del servers[1].server.link.answers[CommitUpdate]
        # The same version again reaches the one left behind; the other has it.
        reply = await routed.http.post("/update_weights_from_disk", json=of(4))
        assert reply.status_code == 200
        await routed.until_ready(2)
        assert await outputs(routed, 4) == [expected_tokens([1, 2], 5, shift=4)] * 4

    fleet(2, test)


def test_a_worker_that_comes_with_old_weights_gets_the_folder_of_the_last_update() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        await routed.http.post("/update_weights_from_disk", json=of(3))
        async with live() as other:
            await routed.http.post("/workers", json={"url": other.url})
            await routed.until_ready(2)
            assert await outputs(routed, 4) == [expected_tokens([1, 2], 5, shift=3)] * 4

    fleet(1, test)


def test_a_worker_with_old_weights_waits_where_there_is_no_folder() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        await routed.http.post("/pause_generation", json={"mode": "retract"})
        await routed.http.post("/update_weights_from_disk", json={**of(3), "partial": True})
        await routed.http.post("/continue_generation", json={})
        assert routed.router.fleet.version == "3"
        async with live() as other:
            await routed.http.post("/workers", json={"url": other.url})
            await routed.until(lambda: all(worker.joined for worker in routed.router.fleet))
            healthy, why = (await states(routed))[other.url]
            assert not healthy and "publish '3'" in why
            # The trainer is told by the answer to whatever it calls next.
            told = (await routed.http.post("/pause_generation", json={})).json()
            assert "publish '3'" in told["out_of_rotation"][other.url]

    fleet(1, test)


def test_pauses_reach_all_and_a_request_waits_for_the_resume() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        assert (await routed.http.post("/pause_generation", json={})).status_code == 200
        assert all(server.server.link.leader.state().paused for server in servers)
        waiting = asyncio.create_task(outputs(routed, 2))
        assert (await routed.http.post("/continue_generation", json={})).status_code == 200
        assert await waiting == [expected_tokens([1, 2], 5)] * 2

    fleet(2, test)


def test_sessions_stay_where_they_were_opened() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        opened = [(await routed.http.post("/sessions", json={})).json()["id"] for _ in range(4)]
        for name in opened:
            body = {"input_ids": [1, 2], "sampling_params": SAMPLING, "session": name}
            for _ in range(2):
                reply = await routed.http.post("/generate", json=body)
                assert reply.status_code == 200, reply.text
            assert (await routed.http.get(f"/sessions/{name}")).json()["num_turns"] == 2
            assert (await routed.http.delete(f"/sessions/{name}")).status_code == 200

    fleet(2, test)


BUCKET = "/update_weights_from_distributed"


async def gather(routed: Routed, *names: str) -> None:
    """Buckets of an update that nobody ends, while requests run."""
    for name in names:
        reply = await routed.http.post(BUCKET, json=one(name, flush_cache=False))
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("call", ["/flush_cache", "/reset_prefix_cache", "/pause_generation"])
def test_what_gathered_is_committed_on_all_by_the_call_that_ends_it(call: str) -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        models = [WholeModel(server.server, "a", "b") for server in servers]
        await gather(routed, "a")
        if call != "/pause_generation":
            # Not whole anywhere: it stays open.
            assert (await routed.http.post(call, json={})).status_code == 200
            await gather(routed, "b")
            assert [model.committed for model in models] == [[], []]
        else:
            await gather(routed, "b")
        assert (await routed.http.post(call, json={})).status_code == 200
        assert [model.committed for model in models] == [[["a", "b"]], [["a", "b"]]]
        assert routed.router.fleet.version == "1"
        assert len(routed.router.fleet.rotation()) == 2

    fleet(2, test)


@pytest.mark.parametrize("call", ["/flush_cache", "/pause_generation", "/begin_weight_update"])
def test_what_gathered_on_one_only_is_dropped_on_all(call: str) -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        first = WholeModel(servers[0].server, "a", "b")
        other = WholeModel(servers[1].server, "a", "b", "c")
        await gather(routed, "a", "b")
        reply = await routed.http.post(call, json={})
        told = reply.json()
        if call == "/flush_cache":
            assert reply.status_code >= 400
            why = told["error"]["message"]
        else:
            assert reply.status_code == 200, reply.text
            why = told["dropped"]
        assert servers[1].url in why and "c missing" in why
        assert servers[0].url not in why.partition("c missing")[2]
        assert (first.committed, other.committed) == ([], [])
        for server in servers:
            state = await server.server.engine.state(max_age_s=0)
            assert state.open_update is None or call == "/begin_weight_update"
            assert state.version == 0
        assert len(routed.router.fleet.rotation()) == 2

    fleet(2, test)


def test_an_update_that_waits_for_one_router_is_no_other_routers() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        first, other = servers
        async with routing() as second:
            for server in servers:
                await second.http.post("/workers", json={"url": server.url})
            await second.until_ready(2)
            # As the other router's first phase, which has come to one of them only.
            held = await routed.http.post(
                f"{first.url}/update_weights_from_disk",
                json=of(7),
                headers={"x-slipstream-phase": "prepare"},
            )
            assert held.status_code == 200, held.text
            for path, body in (("/update_weights_from_disk", of(8)), (BUCKET, one("w"))):
                reply = await second.http.post(path, json=body)
                assert reply.status_code >= 400
                assert first.url in reply.json()["error"]["message"]
            for path in ("/pause_generation", "/continue_generation", "/flush_cache"):
                assert (await second.http.post(path, json={})).status_code == 200
            assert [commands(server, CommitUpdate) for server in servers] == [0, 0]
            assert (await first.server.engine.state(max_age_s=0)).open_update == 7
            assert (await other.server.engine.state(max_age_s=0)).open_update is None
            dropped = await routed.http.post(
                f"{first.url}/internal/drop_update", json={"version": 7}
            )
            assert dropped.status_code == 200
            assert (await second.http.post("/update_weights_from_disk", json=of(8))).is_success

    fleet(2, test)


def test_two_routers_that_update_at_once_never_mix_two_versions() -> None:
    async def test(routed: Routed, servers: list[Live]) -> None:
        async with routing() as second:
            for server in servers:
                await second.http.post("/workers", json={"url": server.url})
            await second.until_ready(2)
            for step in range(1, 11, 2):
                replies = await asyncio.gather(
                    routed.http.post("/update_weights_from_disk", json=of(step)),
                    second.http.post("/update_weights_from_disk", json=of(step + 1)),
                )
                serve = {(await s.server.engine.state(max_age_s=0)).version for s in servers}
                assert len(serve) == 1, [reply.text for reply in replies]
                for reply in replies:
                    assert reply.status_code == 200 or "UpdateOrder" in reply.text

    fleet(2, test)
