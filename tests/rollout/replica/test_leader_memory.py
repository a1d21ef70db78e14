"""Sleep, updates and versions as the leader sees them, over an executor without a model."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from engine.errors import (
    InvalidRequest,
    MemoryReleased,
    NoVersion,
    UnsupportedOption,
    UpdateOrder,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    GetWeight,
    LoadFromDisk,
    Pause,
    ReleaseMemory,
    Request,
    RequestOutput,
    Resume,
    ResumeMemory,
    SamplingParams,
    SetVersion,
    StepPlan,
    VersionSpan,
)
from rollout.replica.inline import InlineReplica
from rollout.scheduler.readiness import Readiness
from tests.helpers.fake_executor import FakeExecutor, FakePending, expected_tokens
from tests.helpers.replicas import fake_config, inline, make_request, overlapped

PROMPT = [1, 2, 3]


@pytest.fixture(params=[inline, overlapped], ids=["plain", "overlapped"])
def replica(request: pytest.FixtureRequest) -> Iterator[InlineReplica]:
    with request.param() as made:
        yield made


def run(replica: InlineReplica, limit: int = 500) -> dict[str, RequestOutput]:
    final: dict[str, RequestOutput] = {}
    for _ in range(limit):
        final |= {o.rid: o for o in replica.step() if o.finish is not None}
        if replica.idle():
            return final
    raise AssertionError(f"not idle: {replica.state().refusal}")


def publish(replica: InlineReplica, version: int, shift: int, **options: object) -> None:
    replica.send(BeginUpdate(version=version, **options))
    replica.send(LoadFromDisk(path=str(shift)))
    replica.send(CommitUpdate(version=version))


def policied(rid: str, policy: str) -> Request:
    return Request(
        rid=rid,
        prompt_ids=np.array(PROMPT, np.int32),
        sampling=SamplingParams(max_new_tokens=8),
        seed=1,
        kv_policy=policy,
    )


def test_requests_wait_through_sleep_and_go_on_with_the_new_weights(replica) -> None:
    replica.submit([make_request("a", PROMPT)])
    replica.send(ReleaseMemory())
    assert replica.state().released == ["weights", "kv_cache", "cuda_graph"]
    for _ in range(5):
        assert replica.step() == []
    assert "released" in replica.state().refusal
    replica.send(ResumeMemory(tags=["weights"]))
    publish(replica, 1, 5)
    assert replica.step() == [] and "kv_cache" in replica.state().refusal
    replica.send(ResumeMemory())
    assert replica.state().refusal == ""
    output = run(replica)["a"]
    assert output.token_ids.tolist() == expected_tokens(PROMPT, 8, shift=5)
    assert {span.version for span in output.spans} == {1}


def test_weights_that_came_back_undefined_serve_nobody(replica) -> None:
    replica.send(ReleaseMemory(tags=["weights"]))
    replica.send(ResumeMemory(tags=["weights"]))
    replica.submit([make_request("a", PROMPT)])
    assert replica.step() == [] and "publish a whole version" in replica.state().refusal
    publish(replica, 1, 0, partial=True)
    assert replica.step() == []
    publish(replica, 2, 3)
    assert run(replica)["a"].token_ids.tolist() == expected_tokens(PROMPT, 8, shift=3)


@pytest.mark.parametrize(
    "command",
    [
        BeginUpdate(version=1),
        LoadFromDisk(path="1"),
        CommitUpdate(version=1),
        CheckWeights(),
        GetWeight(name="shift"),
    ],
    ids=lambda command: type(command).__name__,
)
def test_nothing_touches_weights_that_are_released(replica, command) -> None:
    replica.send(ReleaseMemory())
    with pytest.raises(MemoryReleased, match="resume 'weights' first"):
        replica.send(command)
    replica.send(AbortUpdate(version=1))
    replica.send(ResumeMemory())
    publish(replica, 1, 0)
    replica.submit([make_request("a", PROMPT)])
    assert len(run(replica)["a"].token_ids) == 8


def test_release_is_refused_under_requests_and_works_once_they_are_retracted(replica) -> None:
    replica.submit([make_request("a", PROMPT)])
    replica.step()
    replica.step()
    with pytest.raises(InvalidRequest, match="hold KV pages"):
        replica.send(ReleaseMemory())
    replica.send(Pause(mode="keep"))
    assert replica.state().pause_mode == "keep"
    with pytest.raises(InvalidRequest, match="hold KV pages"):
        replica.send(ReleaseMemory())
    replica.send(ReleaseMemory(tags=["weights"]))
    replica.send(ResumeMemory(tags=["weights"]))
    publish(replica, 1, 0)
    replica.send(Pause(mode="retract"))
    replica.send(ReleaseMemory(tags=["kv_cache"]))
    assert replica.state().cached_pages == 0
    replica.send(ResumeMemory(tags=["kv_cache"]))
    replica.send(Resume())
    assert replica.state().pause_mode is None
    assert run(replica)["a"].token_ids.tolist() == expected_tokens(PROMPT, 8)


def test_a_release_that_pauses_is_refused_before_it_pauses(replica) -> None:
    replica.submit([make_request("a", PROMPT)])
    replica.step()
    replica.send(BeginUpdate(version=1))
    with pytest.raises(UpdateOrder, match="version 1 is open"):
        replica.send(ReleaseMemory(pause="abort"))
    replica.send(AbortUpdate(version=1))
    with pytest.raises(InvalidRequest, match="hold KV pages"):
        replica.send(ReleaseMemory(pause="keep"))
    assert not replica.state().paused
    replica.send(ReleaseMemory(tags=["kv_cache"], pause="retract"))
    assert replica.state().pause_mode == "retract"
    replica.send(ResumeMemory())
    replica.send(Resume())
    assert run(replica)["a"].token_ids.tolist() == expected_tokens(PROMPT, 8)


@pytest.mark.parametrize("model,kind", [("fake", "abort"), ("lasting", "length")])
def test_a_release_that_aborts_needs_memory_that_goes(model: str, kind: str) -> None:
    with inline(model) as replica:
        replica.submit([make_request("a", PROMPT)])
        replica.step()
        if model == "lasting":
            with pytest.raises(UnsupportedOption, match=r"memory\.saver"):
                replica.send(ReleaseMemory(pause="abort"))
        else:
            replica.send(ReleaseMemory(pause="abort"))
        finish = run(replica)["a"].finish
        assert finish is not None and finish.type == kind


def test_an_update_while_requests_run_follows_their_policies(replica) -> None:
    replica.submit([policied(policy, policy) for policy in ("keep", "recompute", "fresh")])
    for _ in range(4):
        replica.step()
    publish(replica, 1, 5)
    outputs = run(replica)
    for policy in ("keep", "recompute"):
        assert outputs[policy].spans[0].version == 0 and outputs[policy].spans[-1].version == 1
    assert [span.version for span in outputs["keep"].kv_spans] == [0, 1]
    assert outputs["recompute"].kv_spans == [VersionSpan(1, 0, 10)]
    fresh = outputs["fresh"]
    assert fresh.token_ids.tolist() == expected_tokens(PROMPT, 8, shift=5)
    assert (fresh.spans, fresh.kv_spans) == ([VersionSpan(1, 0, 8)], [VersionSpan(1, 0, 10)])
    assert fresh.num_restarts == 1


def test_open_updates_are_told_and_committing_twice_changes_nothing(replica) -> None:
    replica.send(BeginUpdate(version=7))
    assert replica.state().open_update == 7
    with pytest.raises(UpdateOrder, match="version 7 is open"):
        replica.send(ReleaseMemory())
    replica.send(LoadFromDisk(path="2"))
    replica.send(CommitUpdate(version=7))
    state = replica.state()
    assert (state.open_update, state.version) == (None, 7)
    replica.send(BeginUpdate(version=8))
    replica.send(AbortUpdate(version=8))
    assert replica.state().open_update is None


def test_versions_are_named_forwards_only(replica) -> None:
    replica.submit([policied("fresh", "fresh")])
    for _ in range(3):
        replica.step()
    replica.send(SetVersion(version=5))
    assert replica.state().version == 5
    for command in (SetVersion(version=4), BeginUpdate(version=5)):
        with pytest.raises(UpdateOrder, match="5 serves now") as refusal:
            replica.send(command)
        assert refusal.value.field == "version"
    replica.send(SetVersion(version=5))
    publish(replica, 6, 0)
    output = run(replica)["fresh"]
    assert output.spans == [VersionSpan(6, 0, 8)] and output.num_restarts >= 1


class DeadExecutor(FakeExecutor):
    """One whose last update died while it was writing, until the next commit."""

    dead = True

    def execute(self, plan: StepPlan):
        if self.dead:
            raise NoVersion("the weights are a mixture", field="version")
        return super().execute(plan)

    def launch(self, plan: StepPlan) -> FakePending:
        return FakePending(self.execute(plan))

    def handle(self, command):
        self.dead = self.dead and not isinstance(command, CommitUpdate)
        return super().handle(command)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_update_that_died_in_place_is_told_until_the_next(overlap: bool) -> None:
    config = fake_config(overlap=overlap)
    executor = DeadExecutor(config)
    with InlineReplica(config, executor) as replica:
        replica.submit([make_request("a", PROMPT)])
        assert run(replica)["a"].finish.error == "NoVersion"
        assert replica.state().refusal == "the weights are a mixture"
        executor.dead = False
        replica.submit([make_request("b", PROMPT)])
        finish = run(replica)["b"].finish
        assert (finish.error, finish.message) == ("NoVersion", "the weights are a mixture")
        publish(replica, 1, 0)
        assert replica.state().refusal == ""
        replica.submit([make_request("c", PROMPT)])
        assert run(replica)["c"].finish.type == "length"


class Recorder(FakeExecutor):
    """Keeps the names of its commands."""

    names: list[str]

    def handle(self, command):
        self.names = [*getattr(self, "names", []), type(command).__name__]
        return super().handle(command)


def test_weights_go_only_once_a_late_update_is_undone() -> None:
    """An undo that came after the release would put values into memory that is gone."""
    config = fake_config()
    executor = Recorder(config)
    with InlineReplica(config, executor) as replica:
        replica.send(BeginUpdate(version=1, mode="undo", timeout_s=0.01))
        time.sleep(0.05)
        replica.send(ReleaseMemory(tags=["weights"]))
        replica.send(ResumeMemory())
        for _ in range(3):
            replica.step()
        assert executor.names == ["BeginUpdate", "AbortUpdate", "ReleaseMemory", "ResumeMemory"]


def test_weights_stay_while_a_late_update_cannot_be_undone() -> None:
    ready = Readiness(version=0, keeps_weights=True)
    ready.begun(BeginUpdate(version=1, mode="undo", timeout_s=0.0))
    time.sleep(0.01)
    with inline() as replica:
        stats = replica._leader._scheduler.stats()
    with pytest.raises(UpdateOrder, match="version 1 is open"):
        ready.check_release(["weights"], stats)
    ready.aborted()
    ready.check_release(["weights"], stats)
