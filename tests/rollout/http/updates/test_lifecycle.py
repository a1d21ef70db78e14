"""The state machine under the dialects: sessions that open themselves, failures, and faults."""

import asyncio
from typing import Any

import pytest

from engine.errors import (
    ManifestMismatch,
    SlipstreamError,
    UnsupportedOption,
    UpdateTimeout,
)
from engine.protocol import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    FlushCache,
    GetWeight,
    Pause,
    ReceiveBroadcast,
    ReleaseMemory,
    Reply,
    Resume,
    ResumeMemory,
    SetVersion,
    WeightsReport,
)
from tests.helpers.control_calls import FOUR, accept, kinds, push, refuse
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import run, serving, until
from tests.helpers.replicas import fake_config


def test_tensors_open_an_update_and_the_resume_commits_it() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await server.post("/pause_generation", {"mode": "in_place"})
            await push(server)
            await push(server)
            await server.post("/continue_generation")
            assert kinds(server) == [
                Pause, BeginUpdate, ReceiveBroadcast, ReceiveBroadcast, CommitUpdate, Resume,
            ]  # fmt: skip
            assert (await server.get("/weight_version")).json() == {"weight_version": "1"}

    run(test)


@pytest.mark.parametrize(
    "path,body",
    [
        ("/pause_generation", {}),
        ("/begin_weight_update", {}),
        ("/resume_memory_occupation", {"tags": ["kv_cache"]}),
        ("/update_weights_from_disk", {"model_path": "/1"}),
    ],
)
def test_what_else_ends_an_update_that_nobody_opened(path: str, body: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await push(server)
            assert (await server.post(path, body)).status_code == 200
            assert kinds(server)[:3] == [BeginUpdate, ReceiveBroadcast, CommitUpdate]

    run(test)


def test_the_last_tensors_commit_by_themselves_unless_a_session_is_open() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await push(server, flush_cache=True)
            assert kinds(server) == [BeginUpdate, ReceiveBroadcast, CommitUpdate]
            assert (await server.post("/begin_weight_update")).status_code == 200
            await push(server, flush_cache=True, weight_version="nine")
            await server.post("/continue_generation")
            assert kinds(server) == [BeginUpdate, ReceiveBroadcast, Resume]
            assert (await server.post("/end_weight_update")).status_code == 200
            assert kinds(server) == [CommitUpdate]
            assert (await server.get("/weight_version")).json() == {"weight_version": "nine"}

    run(test)


def test_labels_become_growing_versions_and_come_back_in_replies() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            for label, version in [("40", 40), ("step-7", 41), ("3", 42), ("43", 43)]:
                await push(server, weight_version=label, flush_cache=True)
                begin = next(c for c in server.commands() if isinstance(c, BeginUpdate))
                assert begin.version == version
                body = {"input_ids": [1], "sampling_params": FOUR}
                meta = (await server.post("/generate", body)).json()["meta_info"]
                assert meta["weight_version"] == label
                assert meta["weight_versions"] == [{"version": label, "start": 0, "end": 4}]
                info = (await server.get("/model_info")).json()
                assert info["weight_version"] == label

    run(test)


def test_a_failed_bucket_drops_the_update_and_refuses_the_rest_of_it() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await server.post("/pause_generation")
            await push(server)
            refuse(server, ReceiveBroadcast, ManifestMismatch("no tensor w", field="w"))
            reply = await push(server)
            assert reply.status_code == 400
            found = reply.json()
            assert (found["success"], found["message"]) == (False, "no tensor w")
            assert found["error"]["type"] == "ManifestMismatch"
            assert kinds(server)[-1] is AbortUpdate
            accept(server)
            later = (await push(server)).json()
            assert later["error"]["type"] == "UpdateOrder"
            assert "no tensor w" in later["message"]
            await server.post("/continue_generation")
            assert CommitUpdate not in kinds(server)
            assert (await server.get("/weight_version")).json() == {"weight_version": "0"}
            assert (await push(server, flush_cache=True)).status_code == 200

    run(test)


def test_a_whole_update_in_one_call_may_be_tried_again() -> None:
    async def test() -> None:
        async with serving() as server:
            refuse(server, ReceiveBroadcast, UpdateTimeout("rank 0 is late", field="w"))
            assert (await push(server, flush_cache=True)).json()["error"]["code"] == 408
            accept(server)
            assert (await push(server, flush_cache=True)).status_code == 200

    run(test)


def test_a_failed_commit_is_told_and_the_next_resume_serves_the_old_version() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await server.post("/pause_generation")
            await push(server)
            refuse(server, CommitUpdate, ManifestMismatch("missing v", field="v"))
            assert (await server.post("/continue_generation")).status_code == 400
            assert Resume not in kinds(server)
            assert (await server.post("/continue_generation")).status_code == 200
            state = await server.engine.state(max_age_s=0)
            assert (state.paused, state.version) == (False, 0)

    run(test)


def test_weights_lost_in_a_release_take_a_whole_update() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await server.post("/release_memory_occupation")
            await server.post("/resume_memory_occupation", {"tags": ["weights"]})
            await push(server, flush_cache=True, partial=True)
            await push(server, flush_cache=True)
            await server.post("/resume_memory_occupation")
            await push(server, flush_cache=True, partial=True)
            found = server.commands()
            partial = [command.partial for command in found if isinstance(command, BeginUpdate)]
            assert partial == [False, True]
            assert [type(c) for c in found][:6] == [
                ReleaseMemory, ResumeMemory, BeginUpdate, ReceiveBroadcast, ReceiveBroadcast,
                CommitUpdate,
            ]  # fmt: skip

    run(test)


def test_sessions_out_of_order() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            reply = await server.post("/end_weight_update")
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "UpdateOrder")
            reply = await server.post("/finish_weight_update")
            assert (reply.status_code, reply.json()["error"]["type"]) == (409, "UpdateOrder")
            first = (await server.post("/begin_weight_update")).json()["message"]
            again = (await server.post("/begin_weight_update")).json()["message"]
            assert first == again == "update 1 is open"
            await push(server)
            twice = await server.post("/begin_weight_update")
            assert "has received tensors" in twice.json()["message"]
            disk = await server.post("/update_weights_from_disk", {"model_path": "/1"})
            assert disk.json()["error"]["type"] == "UpdateOrder"
            assert (await server.post("/end_weight_update")).status_code == 200

    run(test)


def test_a_caller_of_the_protocol_and_a_dialect_see_one_update() -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            await push(server)
            begin = {"type": "begin_update", "version": 5}
            assert (await server.post("/command", begin)).status_code == 200
            assert kinds(server)[-2:] == [CommitUpdate, BeginUpdate]
            assert (await server.post("/continue_generation")).status_code == 200
            load = {"type": "load_from_disk", "path": "4"}
            await server.post("/command", load)
            report = (await server.post("/command", {"type": "commit_update", "version": 5})).json()
            assert report["report"]["version"] == 5
            assert (await server.post("/end_weight_update")).status_code == 400

    run(test)


def test_a_body_that_is_no_command() -> None:
    async def test() -> None:
        async with serving() as server:
            for body in (
                {"type": "explode"},
                {"type": "pause", "mode": 3},
                {"type": "shutdown"},
                [],
            ):
                reply = await server.post("/command", body)
                assert (reply.status_code, reply.json()["error"]["type"]) == (400, "InvalidRequest")
            assert server.commands() == []

    run(test)


def test_a_rename_of_the_version() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"new_version": "v2", "abort_all_requests": False}
            reply = (await server.post("/update_weight_version", body)).json()
            assert (reply["success"], reply["new_version"]) == (True, "v2")
            await server.post("/update_weight_version", body)
            assert server.commands() == [SetVersion(version=1)]
            await server.post("/update_weight_version", {"new_version": "8"})
            assert kinds(server) == [Abort, SetVersion]

    run(test)


def test_a_flush_waits_as_long_as_it_is_told() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            left = [3]

            def busy(_: object) -> Reply | None:
                left[0] -= 1
                if left[0] >= 0:
                    raise SlipstreamError("requests hold pages")
                return None

            server.link.answers[FlushCache] = busy
            assert (await server.get("/flush_cache")).status_code == 400
            assert (await server.post("/flush_cache?timeout=5")).status_code == 200
            left[0] = 10**9
            assert (await server.get("/flush_cache?timeout=0.05")).status_code == 400
            assert (await server.post("/reset_prefix_cache")).json()["success"] is False

    run(test)


def test_pausing_by_wait_lets_requests_end_and_holds_new_ones() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 30}}
            first = asyncio.create_task(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 1)
            pause = asyncio.create_task(server.post("/pause?mode=wait"))
            await asyncio.sleep(0)
            second = asyncio.create_task(server.post("/generate", body))
            assert (await pause).status_code == 200
            assert len((await first).json()["output_ids"]) == 30
            await asyncio.sleep(0.02)
            assert not second.done()
            await server.post("/resume")
            assert (await second).json()["output_ids"] == expected_tokens([1], 30)

    run(test)


@pytest.mark.parametrize("paused", [False, True])
def test_a_sleep_that_is_not_served_leaves_generation_as_it_was(paused: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            if paused:
                await server.post("/pause?mode=keep")
            refuse(server, ReleaseMemory, UnsupportedOption("no saver", field="memory"))
            assert (await server.post("/sleep?mode=keep")).status_code == 400
            assert (await server.get("/is_paused")).json() == {"is_paused": paused}

    run(test)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
@pytest.mark.parametrize("why", ["no saver", "an update is open"])
def test_what_refuses_a_sleep_does_so_before_any_request_ends(why: str, mode: str) -> None:
    async def test() -> None:
        engine = fake_config("lasting" if why == "no saver" else "fake")
        async with serving(engine=engine) as server:
            if why != "no saver":
                await server.post("/command", {"type": "begin_update", "version": 1})
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 200}}
            running = asyncio.create_task(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 1)
            reply = await server.post(f"/sleep?mode={mode}&tags=weights")
            kind = "UnsupportedOption" if why == "no saver" else "UpdateOrder"
            assert reply.json()["error"]["type"] == kind, reply.text
            assert mode == "wait" or not running.done()
            assert (await running).json()["output_ids"] == expected_tokens([1], 200)
            assert (await server.get("/is_paused")).json() == {"is_paused": False}

    run(test)


def test_sleep_and_wake() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sleep?level=2&mode=keep")
            assert (await server.get("/is_sleeping")).json() == {"is_sleeping": True}
            await server.post("/wake_up?tags=weights")
            assert (await server.get("/is_sleeping")).json() == {"is_sleeping": True}
            assert (await server.get("/is_paused")).json() == {"is_paused": True}
            await server.post("/wake_up?tags=kv_cache&tags=cuda_graph")
            assert (await server.get("/is_sleeping")).json() == {"is_sleeping": False}
            assert (await server.get("/is_paused")).json() == {"is_paused": False}
            assert server.commands() == [
                ReleaseMemory(pause="keep"),
                ResumeMemory(tags=["weights"]),
                ResumeMemory(tags=["kv_cache", "cuda_graph"]),
                Resume(),
            ]

    run(test)


def test_aborts_name_a_prefix_or_all_and_nothing_by_default() -> None:
    async def test() -> None:
        async with serving() as server:
            for body in ({}, {"rid": ""}, {"rid": None}):
                reply = await server.post("/abort_request", body)
                assert (reply.status_code, reply.content) == (200, b"")
            assert server.commands() == []
            await server.post("/abort_request", {"rid": "ab"})
            await server.post("/abort_request", {"rid": "ab", "abort_all": True})
            await server.post("/abort_requests", {"request_ids": ["x", "y"]})
            assert server.commands() == [
                Abort(rid_prefix="ab"),
                Abort(all=True),
                Abort(rid="x"),
                Abort(rid="y"),
            ]

    run(test)


def test_an_abort_by_the_id_of_a_call_ends_its_samples_and_nobody_elses() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"model": "fake", "prompt": [1], "max_tokens": 400, "ignore_eos": True}
            ids = ["c", "c1", "c-1"]
            bodies = [{**body, "request_id": name, "n": 2} for name in ids]
            server.link.stalled = True
            first, *others = [
                asyncio.create_task(server.post("/v1/completions", b)) for b in bodies
            ]
            await until(lambda: server.engine.num_open == 6)
            await server.post("/abort_requests", {"request_ids": ["c", "absent", "c-"]})
            server.link.stalled = False
            reasons = [choice["finish_reason"] for choice in (await first).json()["choices"]]
            assert reasons == ["abort", "abort"]
            for other in others:
                found = (await other).json()
                assert [choice["finish_reason"] for choice in found["choices"]] == ["length"] * 2

    run(test)


def test_an_abort_returns_what_there_is() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [1], "rid": "mine", "sampling_params": {"max_new_tokens": 400}}
            task = asyncio.create_task(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 1)
            await server.post("/abort_request", {"rid": "mi"})
            found = (await task).json()
            count = len(found["output_ids"])
            assert found["meta_info"]["finish_reason"]["type"] == "abort"
            assert found["output_ids"] == expected_tokens([1], count)

    run(test)


def test_checks_of_weights() -> None:
    async def test() -> None:
        async with serving() as server:
            reports = [WeightsReport(rank=r, checksums={"b": 2, "a": r}) for r in (0, 1)]
            server.link.answers[CheckWeights] = lambda _: Reply(weights=reports)
            found = (await server.post("/weights_checker", {"action": "checksum"})).json()
            assert found["success"]
            assert [rank["checksums"]["a"] for rank in found["ranks"]] == [0, 1]
            digests = {rank["per_gpu_checksum"] for rank in found["ranks"]}
            assert len(digests | {found["per_engine_checksum"]}) == 3
            differing = WeightsReport(differing=["a"])
            server.link.answers[CheckWeights] = lambda _: Reply(weights=[differing])
            found = (await server.post("/weights_checker", {"action": "compare"})).json()
            assert (found["success"], found["message"]) == (False, "1 tensors differ: a")
            assert not (await server.post("/weight_checker", {"action": "compare"})).json()[
                "success"
            ]
            actions = [c.action for c in server.commands() if isinstance(c, CheckWeights)]
            assert actions == ["checksum", "compare", "compare"]
            values = WeightsReport(values=[1.0, 2.5])
            server.link.answers[GetWeight] = lambda _: Reply(weights=[values])
            for found in (
                await server.get("/get_weights_by_name?name=w&truncate_size=2"),
                await server.post("/get_weights_by_name", {"name": "w", "truncate_size": 2}),
            ):
                assert found.json() == [1.0, 2.5]
            assert server.commands() == [GetWeight(name="w", count=2)] * 2

    run(test)
