"""One update over several engines: all take it or none, and what is told where neither holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.errors import (
    ChecksumMismatch,
    EngineDead,
    FleetDivided,
    GroupError,
    ManifestMismatch,
    NonFiniteWeights,
    SlipstreamError,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    GetState,
    JoinGroup,
    LoadFromDisk,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveIpc,
)
from tests.helpers.engines import make_replica
from tests.helpers.faulty_target import FaultyTarget
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge import fleet
from trainer_bridge.bridge import Publisher, PushOptions

TRANSPORTS = ["nccl", "cuda_ipc", "disk", "delta"]
CARRIED_BY = {
    "nccl": ReceiveBroadcast,
    "cuda_ipc": ReceiveIpc,
    "disk": LoadFromDisk,
    "delta": LoadFromDisk,
}
DEAD = EngineDead("it is gone", field="leader")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "qwen2", tie_word_embeddings=True)


@pytest.fixture
def engines(tiny, monkeypatch) -> Iterator[list[FaultyTarget]]:
    monkeypatch.setattr(fleet, "_COMMIT_PAUSE_S", 0.0)
    targets = [FaultyTarget(make_replica(tiny[0])) for _ in range(2)]
    yield targets
    for target in targets:
        target.engine.close()


def trained(seed: int) -> torch.nn.Module:
    return tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)


def options(transport: str = "cuda_ipc") -> PushOptions:
    return PushOptions(transport=transport, bucket_bytes=4096, timeout_s=20.0)


def versions(engines: list[FaultyTarget]) -> list[int]:
    return [target.engine.state().version for target in engines]


def assert_serve(engines: list[FaultyTarget], version: int, model: torch.nn.Module) -> None:
    for target in engines:
        state = target.engine.state()
        assert (state.version, state.open_update, state.refusal) == (version, None, "")
        assert logprob_gap(target.engine, model, "r") < 1e-4


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_engine_verifies_before_any_commits(engines, transport: str) -> None:
    with Publisher(trained(1), engines, options(transport)) as publisher:
        publisher.push(1)
    for target in engines:
        order = [kind for kind in target.seen if kind.endswith("Update")]
        assert order == ["BeginUpdate", "PrepareUpdate", "CommitUpdate"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("stage", ["look", "begin", "carry", "prepare"])
def test_a_failure_before_the_commits_moves_nobody(engines, tiny, transport, stage) -> None:
    kind = {
        "look": GetState,
        "begin": BeginUpdate,
        "carry": CARRIED_BY[transport],
        "prepare": PrepareUpdate,
    }[stage]
    new = trained(2)
    with Publisher(new, engines, options(transport)) as publisher:
        engines[1].fail(kind, DEAD)
        with pytest.raises(EngineDead, match="engine 1: it is gone"):
            publisher.push(1)
        assert_serve(engines, 0, tiny[1])
        publisher.push(1)
        assert_serve(engines, 1, new)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_commit_whose_answer_was_lost_is_asked_for_again(engines, transport: str) -> None:
    new = trained(3)
    with Publisher(new, engines, options(transport)) as publisher:
        for target in engines:
            target.fail(CommitUpdate, DEAD, times=2, obeys=True)
        assert publisher.push(1).version == 1
        assert_serve(engines, 1, new)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_left_behind_is_named_and_takes_the_same_version_later(
    engines, transport: str
) -> None:
    first, new = trained(4), trained(5)
    with Publisher(first, engines, options(transport)) as publisher:
        publisher.push(1)
        with torch.no_grad():
            for mine, theirs in zip(first.parameters(), new.parameters(), strict=True):
                mine.copy_(theirs)
        engines[0].fail(CommitUpdate, DEAD, times=99)
        with pytest.raises(FleetDivided) as told:
            publisher.push(2)
        assert "2 serves on engine 1, and not on engine 0 (engine 0: it is gone)" in str(told.value)
        assert told.value.field == "engine 0"
        assert versions(engines) == [1, 2]
        engines[0].heal()
        before = len(engines[1].seen)
        publisher.push(2)
        assert_serve(engines, 2, new)
        assert "CommitUpdate" not in engines[1].seen[before:]
        with torch.no_grad():
            first.model.norm.weight.mul_(1.5)
        publisher.push(3)
        assert_serve(engines, 3, first)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_restarted_before_its_commit_is_left_behind(
    engines, tiny, transport: str
) -> None:
    new = trained(6)
    with Publisher(new, engines, options(transport)) as publisher:
        publisher.push(1)
        send = engines[1].send

        def restart_at_commit(command):
            if isinstance(command, CommitUpdate) and engines[1].send is restart_at_commit:
                engines[1].send = send
                engines[1].restart(make_replica(tiny[0]))
                raise DEAD
            return send(command)

        engines[1].send = restart_at_commit
        with torch.no_grad():
            new.model.norm.weight.mul_(1.5)
        with pytest.raises(FleetDivided, match="without an open update"):
            publisher.push(2)
        assert versions(engines) == [2, 0]
        publisher.push(2)
        assert_serve(engines, 2, new)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("alone", [False, True])
def test_an_engine_that_restarted_between_updates_is_met_again(
    engines, tiny, transport: str, alone: bool
) -> None:
    engines = engines[:1] if alone else engines
    new = trained(7)
    with Publisher(new, engines, options(transport)) as publisher:
        publisher.push(1)
        engines[0].restart(make_replica(tiny[0]))
        with torch.no_grad():
            new.model.norm.weight.mul_(1.5)
        publisher.push(2)
        assert_serve(engines, 2, new)


def test_another_trainer_finishes_what_one_left_divided(engines) -> None:
    new = trained(8)
    engines[1].fail(CommitUpdate, DEAD, times=99)
    with Publisher(new, engines, options()) as publisher, pytest.raises(FleetDivided):
        publisher.push(1)
    engines[1].heal()
    with Publisher(new, engines, options()) as publisher:
        publisher.push(1)
    assert_serve(engines, 1, new)


def test_one_number_for_different_weights_is_noticed(engines) -> None:
    engines[1].fail(CommitUpdate, DEAD, times=99)
    with Publisher(trained(8), engines, options()) as publisher, pytest.raises(FleetDivided):
        publisher.push(1)
    engines[1].heal()
    other = trained(9)
    with Publisher(other, engines, options()) as publisher:
        with pytest.raises(FleetDivided, match="Push a version above 1"):
            publisher.push(1)
        publisher.push(2)
    assert_serve(engines, 2, other)


def test_a_version_that_all_serve_is_refused_by_all(engines) -> None:
    with Publisher(trained(1), engines, options()) as publisher:
        publisher.push(3)
        with pytest.raises(SlipstreamError, match=r"engine 0: .*3 serves now"):
            publisher.push(3)
        assert versions(engines) == [3, 3]


def test_engines_that_all_refuse_the_commit_leave_one_version(engines, tiny) -> None:
    for target in engines:
        target.fail(CommitUpdate, ManifestMismatch("no", field="x"), times=99)
    with (
        Publisher(trained(1), engines, options()) as publisher,
        pytest.raises(ManifestMismatch, match="engine 0: no"),
    ):
        publisher.push(1)
    assert_serve(engines, 0, tiny[1])


def test_an_engine_that_will_not_join_is_told_at_once(engines) -> None:
    """Without waiting for the ranks that then do not come."""
    engines[1].fail(JoinGroup, GroupError("no such network", field="address"))
    with Publisher(trained(1), engines, options("nccl")) as publisher:
        with pytest.raises(GroupError, match="engine 1: no such network"):
            publisher.push(1)
        publisher.push(1)
    assert versions(engines) == [1, 1]


def test_an_abort_that_fails_hides_no_error(engines) -> None:
    engines[0].fail(PrepareUpdate, ChecksumMismatch("bits", field="w"))
    engines[1].fail(AbortUpdate, DEAD)
    with (
        Publisher(trained(1), engines, options()) as publisher,
        pytest.raises(ChecksumMismatch, match="engine 0: bits") as told,
    ):
        publisher.push(1)
    assert told.value.field == "w"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_number_that_is_not_finite_is_told_by_its_tensor_and_moves_nobody(
    engines, tiny, transport: str
) -> None:
    new = trained(10)
    with torch.no_grad():
        new.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with Publisher(new, engines, options(transport)) as publisher:
        with pytest.raises(NonFiniteWeights) as told:
            publisher.push(1)
        assert told.value.field == "model.layers.1.mlp.up_proj.weight"
        assert_serve(engines, 0, tiny[1])
        with torch.no_grad():
            new.model.layers[1].mlp.up_proj.weight[0, 0] = 0.0
        publisher.push(1)
    assert_serve(engines, 1, new)
