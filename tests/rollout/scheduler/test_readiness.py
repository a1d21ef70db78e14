"""Which steps and commands may come, by what is released and which update is open."""

from __future__ import annotations

import dataclasses
import time

import pytest

from engine.errors import InvalidRequest, MemoryReleased, UpdateOrder
from engine.protocol import BeginUpdate
from engine.protocol.deadlines import MAX_TIMEOUT_S
from rollout.scheduler.readiness import ALL_TAGS, Readiness
from tests.helpers.scheduling import Bench

IDLE = Bench().scheduler.stats()
RUNNING = dataclasses.replace(IDLE, num_running=3)
KEPT = dataclasses.replace(RUNNING, paused=True, pause_mode="keep")


def made(*, keeps_weights: bool = False) -> Readiness:
    return Readiness(version=0, keeps_weights=keeps_weights)


def test_an_idle_engine_may_release_anything() -> None:
    for tag in ALL_TAGS:
        made().check_release([tag], IDLE)
    made().check_release(ALL_TAGS, IDLE)


@pytest.mark.parametrize("stats", [RUNNING, KEPT])
def test_kv_is_not_released_under_requests(stats) -> None:
    with pytest.raises(InvalidRequest, match=r"3 requests hold KV pages.*'retract'") as refusal:
        made().check_release(ALL_TAGS, stats)
    assert refusal.value.field == "tags"


def test_weights_may_go_under_kept_requests_and_not_under_running_ones() -> None:
    made().check_release(["weights", "cuda_graph"], KEPT)
    with pytest.raises(InvalidRequest, match="pause before releasing cuda_graph, weights"):
        made().check_release(["weights", "cuda_graph"], RUNNING)


def test_what_is_out_may_be_released_again_whatever_runs() -> None:
    ready = made()
    ready.release(ALL_TAGS)
    ready.check_release(ALL_TAGS, RUNNING)


def test_steps_are_held_until_all_is_back_and_the_order_is_said() -> None:
    ready = made(keeps_weights=True)
    assert ready.hold == ready.refusal == ""
    ready.release(["kv_cache", "weights"])
    assert ready.released == ["weights", "kv_cache"]
    assert "in this order: weights, kv_cache" in ready.hold
    ready.resume(["weights"])
    assert "kv_cache" in ready.hold
    ready.resume(ALL_TAGS)
    assert ready.hold == ""


def update(ready: Readiness, version: int, refusal: str = "", **options: object) -> None:
    command = BeginUpdate(version=version, **options)
    ready.check_begin(command, 0)
    ready.begun(command)
    assert ready.open_update == version
    assert ready.committed(version, refusal)


def test_weights_without_a_backup_are_undefined_until_a_whole_update() -> None:
    ready = made()
    ready.release(ALL_TAGS)
    ready.resume(ALL_TAGS)
    assert "publish a whole version" in ready.hold
    update(ready, 1, "some are missing", partial=True)
    assert "publish a whole version" in ready.hold
    update(ready, 2)
    assert ready.hold == ""


def test_resuming_weights_that_never_left_leaves_them_defined() -> None:
    ready = made()
    ready.release(["kv_cache"])
    ready.resume(ALL_TAGS)
    assert ready.hold == ""


def test_updates_and_reads_need_weights() -> None:
    ready = made()
    ready.check_weights("GetWeight")
    ready.release(["weights"])
    with pytest.raises(MemoryReleased, match=r"GetWeight needs .* resume 'weights' first"):
        ready.check_weights("GetWeight")
    ready.resume(["weights"])
    ready.check_weights("GetWeight")


def test_an_open_update_keeps_its_weights() -> None:
    ready = made()
    ready.begun(BeginUpdate(version=4))
    with pytest.raises(UpdateOrder, match="version 4 is open; commit or abort"):
        ready.check_release(["weights"], IDLE)
    ready.check_release(["kv_cache"], IDLE)
    ready.aborted()
    ready.check_release(["weights"], IDLE)


def test_an_update_that_timed_out_is_not_open() -> None:
    ready = made()
    ready.begun(BeginUpdate(version=4, timeout_s=-1.0))
    assert ready.open_update is None


def test_an_update_in_place_holds_steps_until_it_ends() -> None:
    ready = made()
    ready.begun(BeginUpdate(version=4, mode="in_place"))
    assert "version 4 writes in place" in ready.hold
    ready.aborted()
    assert ready.hold == ""


def test_a_timeout_is_cut_as_the_ranks_cut_it(monkeypatch) -> None:
    ready = made()
    now = time.monotonic()
    ready.begun(BeginUpdate(version=1, mode="in_place", timeout_s=1e9))
    assert ready.hold
    monkeypatch.setattr(time, "monotonic", lambda: now + MAX_TIMEOUT_S + 60)
    assert ready.hold == "" and ready.open_update is None


def test_a_dead_update_is_told_and_does_not_hold_until_the_ranks_are_whole() -> None:
    ready = made()
    ready.died("the weights are a mixture")
    assert (ready.refusal, ready.hold) == ("the weights are a mixture", "")
    update(ready, 1, "the ranks still refuse", partial=True)
    assert ready.refusal
    update(ready, 2)
    assert ready.refusal == ""
    ready.died("the weights are a mixture")
    update(ready, 3, partial=True)
    assert ready.refusal == "", "the repair brought all that was torn"


def test_groups_are_those_joined_and_not_left() -> None:
    ready = made()
    for name in ("b", "a", "b"):
        ready.joined(name)
    assert ready.groups == ["a", "b"]
    ready.left("b")
    ready.left("never")
    assert ready.groups == ["a"]


def test_a_second_commit_is_told_apart() -> None:
    ready = made()
    update(ready, 1)
    assert not ready.committed(1, "")


def test_no_update_goes_behind_a_version_that_was_given_by_name() -> None:
    ready = made()
    ready.check_begin(BeginUpdate(version=1), 0)
    with pytest.raises(UpdateOrder, match="version 10 does not go forward: 10 serves"):
        ready.check_begin(BeginUpdate(version=10), 10)
    ready.check_begin(BeginUpdate(version=11), 10)
