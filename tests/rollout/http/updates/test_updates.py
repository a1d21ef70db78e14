"""Which calls commit, which are refused, and what a trainer that dies between them leaves."""

import asyncio
from typing import Any

import pytest

from engine.errors import EngineDead, GroupError, ManifestMismatch, UpdateOrder, UpdateTimeout
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LoadFromDisk,
    Pause,
    PrepareUpdate,
    ReceiveBroadcast,
    Resume,
)
from rollout.http.updates.lifecycle import Lifecycle
from rollout.http.updates.version_labels import VersionLabels
from rollout.metrics import Metrics
from tests.helpers.control_calls import GROUP, Gate, WholeModel, kinds, one, refuse
from tests.helpers.http_app import Server, run, serving, until

DISTRIBUTED = "/update_weights_from_distributed"
PAUSE, GO_ON = "/pause_generation", "/continue_generation"


async def version(server: Server) -> str:
    return str((await server.get("/weight_version")).json()["weight_version"])


async def send(server: Server, *names: str, **options: Any) -> None:
    for name in names:
        reply = await server.post(DISTRIBUTED, one(name, **options))
        assert reply.status_code == 200, reply.text


def test_buckets_between_pause_and_resume_are_one_update() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b", "c", "d")
            await server.post(PAUSE)
            await send(server, "a", "b", "c", "d", weight_version="7")
            assert model.committed == []
            assert await version(server) == "0"
            assert (await server.post(GO_ON)).status_code == 200
            assert model.committed == [["a", "b", "c", "d"]]
            assert await version(server) == "7"

    run(test)


def test_a_trainer_that_dies_after_three_of_four_buckets_leaves_the_old_version() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b", "c", "d")
            await server.post(PAUSE)
            await send(server, "a", "b", "c")
            reply = await server.post(GO_ON)
            error = reply.json()["error"]
            assert (reply.status_code, error["type"]) == (400, "ManifestMismatch")
            assert (error["field"], "d missing" in error["message"]) == ("d", True)
            assert kinds(server)[-2:] == [CommitUpdate, AbortUpdate]
            assert (await server.post(GO_ON)).status_code == 200
            assert (model.committed, await version(server)) == ([], "0")
            state = await server.engine.state(max_age_s=0)
            assert (state.paused, state.open_update) == (False, None)

    run(test)


@pytest.mark.parametrize("paused_first", [True, False])
def test_the_next_trainer_starts_clean_and_is_told_what_was_dropped(paused_first: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b")
            if paused_first:
                await server.post(PAUSE)
            await send(server, "a", flush_cache=False)
            reply = await server.post(PAUSE)
            assert reply.status_code == 200
            assert "b missing" in reply.json()["message"]
            await send(server, "a", "b")
            await server.post(GO_ON)
            assert model.committed == [["a", "b"]]
            assert await version(server) == "1"

    run(test)


def test_two_trainers_told_apart_by_their_labels_make_no_mixture() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b")
            await server.post(PAUSE)
            await send(server, "a", weight_version="old")
            await send(server, "b", weight_version="new")
            reply = await server.post(GO_ON)
            assert reply.json()["error"]["field"] == "a"
            await server.post(PAUSE)
            await send(server, "a", weight_version="old")
            await send(server, "a", "b", weight_version="new")
            await server.post(GO_ON)
            assert model.committed == [["a", "b"]]
            assert await version(server) == "new"

    run(test)


@pytest.mark.parametrize("partial,status,committed", [(False, 400, []), (True, 200, [["a"]])])
def test_while_requests_run_the_last_call_commits_what_it_may(
    partial: bool, status: int, committed: list[list[str]]
) -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b")
            reply = await server.post(DISTRIBUTED, one("a", partial=partial))
            assert reply.status_code == status
            assert model.committed == committed
            await send(server, "a", flush_cache=False)
            await send(server, "b")
            assert model.committed[-1] == ["a", "b"]

    run(test)


def test_a_flush_of_its_own_ends_buckets_that_were_sent_while_requests_run() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b")
            await send(server, "a", flush_cache=False)
            assert (await server.post("/flush_cache")).status_code == 200
            assert model.committed == []
            await send(server, "b", flush_cache=False)
            assert (await server.post("/flush_cache")).status_code == 200
            assert model.committed == [["a", "b"]]
            await server.post(PAUSE)
            await send(server, "a", "b")
            assert (await server.post("/flush_cache")).status_code == 200
            assert len(model.committed) == 1

    run(test)


def test_a_partial_update_says_so_in_its_first_call() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b", "c")
            await server.post(PAUSE)
            await send(server, "a", partial=True)
            await send(server, "b")
            await server.post(GO_ON)
            assert model.committed == [["a", "b"]]
            await server.post(PAUSE)
            await send(server, "a")
            reply = await server.post(DISTRIBUTED, one("b", partial=True))
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, "partial")
            await server.post(PAUSE)
            await send(server, "a", partial=True)
            reply = await server.post(PAUSE)
            assert "dropped" in reply.json()["message"]
            assert len(model.committed) == 1

    run(test)


@pytest.mark.parametrize(
    "path,field", [("/update_weights_from_disk", "model_path"), ("/update_weights", "weight_dir")]
)
def test_a_folder_is_whole_unless_the_body_says_partial(path: str, field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post(path, {field: "/1"})
            await server.post(path, {field: "/1", "partial": True})
            begun = [c.partial for c in server.commands() if isinstance(c, BeginUpdate)]
            assert begun == [False, True]

    run(test)


def test_an_update_that_took_too_long_is_told_once_and_not_for_ever() -> None:
    async def test() -> None:
        async with serving() as server:
            WholeModel(server, "a", "b")
            await send(server, "a", flush_cache=False)
            late = UpdateTimeout("it was not committed within 600 s", field="version")
            refuse(server, ReceiveBroadcast, late)
            reply = await server.post(DISTRIBUTED, one("b"))
            assert reply.json()["error"]["type"] == "UpdateTimeout"
            model = WholeModel(server, "a", "b")
            body = one("a") | {"names": ["a", "b"], "dtypes": ["float32"] * 2, "shapes": [[1]] * 2}
            assert (await server.post(DISTRIBUTED, body)).status_code == 200
            assert model.committed == [["a", "b"]]

    run(test)


def test_the_last_call_of_a_failed_update_is_refused_and_the_next_one_is_not() -> None:
    async def test() -> None:
        async with serving() as server:
            refuse(server, ReceiveBroadcast, ManifestMismatch("no tensor w", field="w"))
            assert (await server.post(DISTRIBUTED, one("w", flush_cache=False))).status_code == 400
            model = WholeModel(server, "a")
            reply = await server.post(DISTRIBUTED, one("a"))
            assert reply.json()["error"]["type"] == "UpdateOrder"
            assert (await server.post(DISTRIBUTED, one("a"))).status_code == 200
            assert model.committed == [["a"]]

    run(test)


@pytest.mark.parametrize("kind", [CommitUpdate, LoadFromDisk])
def test_a_native_update_that_failed_is_no_obstacle_for_ever(kind: type) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/command", {"type": "begin_update", "version": 5})
            refuse(server, kind, ManifestMismatch("missing v", field="v"))
            command: dict[str, Any] = {"type": "commit_update", "version": 5}
            if kind is LoadFromDisk:
                command = {"type": "load_from_disk", "path": "/1"}
            assert (await server.post("/command", command)).status_code == 400
            server.link.answers.clear()
            reply = await server.post("/update_weights_from_disk", {"model_path": "/3"})
            assert reply.status_code == 200, reply.text
            assert await version(server) == "1"

    run(test)


def test_a_native_update_whose_part_failed_may_go_on() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/command", {"type": "begin_update", "version": 5})
            refuse(server, LoadFromDisk, GroupError("not there yet", field="path"))
            load = {"type": "load_from_disk", "path": "/4"}
            assert (await server.post("/command", load)).status_code == 400
            server.link.answers.clear()
            assert (await server.post("/command", load)).status_code == 200
            other = await server.post("/update_weights_from_disk", {"model_path": "/3"})
            assert other.json()["error"]["type"] == "UpdateOrder"
            reply = await server.post("/command", {"type": "commit_update", "version": 5})
            assert reply.json()["report"]["version"] == 5

    run(test)


def test_commands_of_others_do_not_make_an_open_update_fail() -> None:
    async def test() -> None:
        async with serving() as server:
            assert (
                await server.post("/command", {"type": "begin_update", "version": 5})
            ).is_success
            refuse(server, CommitUpdate, UpdateOrder("not 9", field="version"))
            for kind in ("begin_update", "commit_update", "prepare_update"):
                refuse(server, PrepareUpdate, UpdateOrder("not 9", field="version"))
                reply = await server.post("/command", {"type": kind, "version": 9})
                assert reply.status_code == 409
            reply = await server.post("/update_weights_from_disk", {"model_path": "/3"})
            assert "update 5 is open" in reply.json()["message"]

    run(test)


def test_a_label_is_there_before_the_first_token_and_gone_after_a_failure() -> None:
    async def test() -> None:
        async with serving() as server:
            labels = VersionLabels()
            control = Lifecycle(server.engine, labels, Metrics(), keeps_weights=True)
            seen: list[str] = []

            def commit(command: CommitUpdate) -> None:
                seen.append(labels.text(command.version))

            server.link.answers[CommitUpdate] = commit
            await control.updates.load("/1", "first")
            assert (seen, labels.text(1)) == (["first"], "first")
            refuse(server, CommitUpdate, ManifestMismatch("missing v", field="v"))
            with pytest.raises(ManifestMismatch):
                await control.updates.load("/2", "second")
            assert labels.text(2) == "2"

    run(test)


@pytest.mark.parametrize("path", [PAUSE, GO_ON, "/pause?mode=keep", "/resume"])
def test_pauses_and_resumes_do_not_wait_for_tensors(path: str) -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b")
            gate = Gate(server, ReceiveBroadcast)
            task = asyncio.create_task(server.post(DISTRIBUTED, one("a", flush_cache=False)))
            await until(lambda: bool(gate.held))
            reply = await asyncio.wait_for(server.post(path), 30)
            assert reply.status_code == 200
            assert not task.done()
            for other in ("/health", "/server_info", "/is_paused"):
                assert (await server.get(other)).status_code == 200
            assert (await server.post("/abort_request", {"rid": "x"})).status_code == 200
            gate.open()
            assert (await task).status_code == 200
            await send(server, "b", flush_cache=False)
            await server.post(GO_ON)
            assert model.committed == [["a", "b"]]

    run(test)


def test_a_group_that_forms_holds_up_no_other_call() -> None:
    async def test() -> None:
        async with serving() as server:
            WholeModel(server, "a")
            gate = Gate(server, JoinGroup)
            task = asyncio.create_task(server.post("/init_weights_update_group", GROUP))
            await until(lambda: bool(gate.held))
            calls: list[tuple[str, dict[str, Any]]] = [
                ("/pause_generation", {}),
                ("/destroy_weights_update_group", {"group_name": "other"}),
                (DISTRIBUTED, one("a")),
                ("/continue_generation", {}),
                ("/flush_cache", {}),
                ("/update_weight_version", {"new_version": "nine"}),
                ("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}}),
            ]
            for path, body in calls:
                reply = await asyncio.wait_for(server.post(path, body), 30)
                assert reply.status_code == 200, path
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(test)


def test_a_client_that_leaves_during_its_call_leaves_no_half_state() -> None:
    async def test() -> None:
        async with serving() as server:
            control = Lifecycle(server.engine, VersionLabels(), Metrics(), keeps_weights=True)
            gate = Gate(server, BeginUpdate)
            begin = asyncio.create_task(control.updates.begin())
            await until(lambda: bool(gate.held))
            begin.cancel()
            await asyncio.gather(begin, return_exceptions=True)
            gate.open()
            await asyncio.wait_for(control.updates.begin(), 30)
            assert kinds(server) == [BeginUpdate]
            gate = Gate(server, LoadFromDisk)
            command = LoadFromDisk(path="/1")
            feed = asyncio.create_task(control.updates.feed(command))
            await until(lambda: bool(gate.held))
            feed.cancel()
            await asyncio.gather(feed, return_exceptions=True)
            gate.open()
            report = await asyncio.wait_for(control.updates.commit(), 30)
            assert report.version == 1

    run(test)


def test_a_new_engine_is_met_with_a_clean_slate() -> None:
    async def test() -> None:
        async with serving() as server:
            control = Lifecycle(server.engine, VersionLabels(), Metrics(), keeps_weights=True)
            await control.updates.begin()
            server.link.leader.handle(AbortUpdate(version=1))
            control.reset(weights_lost=True)
            assert control.updates._current.update is None
            await control.updates.load("/1", partial=True)
            await control.updates.load("/2", partial=True)
            begun = [c.partial for c in server.commands() if isinstance(c, BeginUpdate)]
            assert begun == [True, False, True]

    run(test)


def test_a_dead_engine_ends_every_call() -> None:
    async def test() -> None:
        async with serving() as server:
            control = Lifecycle(server.engine, VersionLabels(), Metrics(), keeps_weights=True)
            gate = Gate(server, LoadFromDisk)
            load = asyncio.create_task(control.updates.load("/1"))
            await until(lambda: bool(gate.held))
            server.link.die()
            with pytest.raises(EngineDead):
                await load
            with pytest.raises(EngineDead):
                await control.resume()

    run(test)


def test_native_pauses_and_resumes_move_the_same_state() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a")
            await server.post("/command", {"type": "pause", "mode": "keep"})
            await send(server, "a")
            reply = await server.post("/command", {"type": "resume"})
            assert (reply.status_code, model.committed) == (200, [["a"]])
            assert kinds(server) == [Pause, BeginUpdate, ReceiveBroadcast, CommitUpdate, Resume]

    run(test)


def test_replies_say_whether_the_update_was_committed() -> None:
    async def test() -> None:
        async with serving() as server:
            WholeModel(server, "a")
            reply = (await server.post(DISTRIBUTED, one("a"))).json()
            assert reply["message"] == "version 1 serves"
            await server.post(PAUSE)
            reply = (await server.post(DISTRIBUTED, one("a"))).json()
            assert "not committed yet" in reply["message"]

    run(test)


def test_a_bucket_over_another_group_is_another_trainer_s() -> None:
    async def test() -> None:
        async with serving() as server:
            model = WholeModel(server, "a", "b")
            await server.post(PAUSE)
            await send(server, "a", weight_version="7")
            other = {**one("b", weight_version="7"), "group_name": "another"}
            reply = await server.post(DISTRIBUTED, other)
            assert reply.json()["error"]["type"] == "UpdateOrder", reply.text
            assert "another trainer" in reply.text
            await send(server, "b", weight_version="7")
            assert (await server.post(GO_ON)).status_code == 200
            assert model.committed == [["a", "b"]]

    run(test)
