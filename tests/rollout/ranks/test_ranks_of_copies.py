"""Ranks that hold copies of a model: whose results come back, what they are sent, how they end."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.errors import EngineDead, InvalidRequest, WeightUpdateError
from engine.protocol import (
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    LoadFromDisk,
    Request,
    RequestOutput,
    WeightsReport,
)
from engine.protocol.deadlines import SILENT_S
from rollout.ranks.copies_alike import difference
from rollout.ranks.ranked_executor import build_executor
from rollout.replica.inline import InlineReplica
from tests.helpers.fake_executor import POISON, expected_tokens
from tests.helpers.replicas import fake_config, make_request
from tests.rollout.ranks.test_ranks import FACTORY, drain, ends_with, processes

pytestmark = pytest.mark.slow

COPIES = ParallelConfig(dp_size=3, timeout_s=30.0)


def config_of(model: str = "fake", parallel: ParallelConfig = COPIES) -> EngineConfig:
    return replace(fake_config(model), parallel=parallel)


def copies(
    model: str = "fake", parallel: ParallelConfig = COPIES, *, overlap: bool = False
) -> InlineReplica:
    config = config_of(model, parallel)
    config = replace(config, scheduler=replace(config.scheduler, overlap=overlap))
    return InlineReplica(config, build_executor(config, FACTORY))


def several(num: int = 9, **settings: int) -> list[Request]:
    return [make_request(f"r{i}", [i + 1, 2, 3], **settings) for i in range(num)]


def expect(outputs: dict[str, RequestOutput], num: int = 9, shift: int = 0) -> None:
    for i in range(num):
        assert outputs[f"r{i}"].token_ids.tolist() == expected_tokens([i + 1, 2, 3], 8, shift)


@pytest.mark.parametrize("overlap", [False, True])
def test_each_request_gets_what_its_own_copy_sampled(overlap: bool) -> None:
    with copies(overlap=overlap) as replica:
        replica.submit(several())
        replica.step()
        running = [len(one.running) for one in replica._leader._scheduler.copies]
        assert running == [3, 3, 3]
        expect(drain(replica))
        replica.send(BeginUpdate(version=1))
        replica.send(LoadFromDisk(path="5"))
        report = replica.send(CommitUpdate(version=1)).report
        assert report is not None and report.num_bytes == 3 * 8
        replica.submit(several())
        outputs = drain(replica)
        expect(outputs, shift=5)
        assert {span.version for output in outputs.values() for span in output.spans} == {1}


def test_every_rank_takes_part_in_steps_without_rows() -> None:
    """All of one group, and so all of one copy: the steps of the others are their own."""
    with copies(parallel=ParallelConfig(dp_size=2, tp_size=2, timeout_s=30.0)) as replica:
        group = [
            msgspec.structs.replace(make_request(f"r{i}", [i + 1, 2, 3]), group="g")
            for i in range(4)
        ]
        replica.submit(group)
        expect(drain(replica), 4)
        reply = replica.send(CheckWeights())
        traces = [list(report.checksums) for report in reply.weights]
        assert [report.rank for report in reply.weights] == [0, 1, 2, 3]
        assert traces[0] == traces[1] == traces[2] == traces[3]
        assert len(traces[0]) == 8


def test_masks_reach_the_copy_whose_step_waits_for_them() -> None:
    with copies() as replica:
        requests = several()
        requests[4] = msgspec.structs.replace(
            requests[4], allowed_token_ids=np.array([5, 90], np.int32)
        )
        requests[5] = msgspec.structs.replace(
            requests[5], allowed_token_ids=np.array([7], np.int32)
        )
        replica.submit(requests)
        outputs = drain(replica)
        assert outputs["r4"].token_ids.tolist() == expected_tokens([5, 2, 3], 8, allowed=[5, 90])
        assert outputs["r5"].token_ids.tolist() == [7] * 8
        assert outputs["r6"].token_ids.tolist() == expected_tokens([7, 2, 3], 8)
        # Of the first copy nothing waited, so it heard of no masks.
        reply = replica._leader._executor._local.handle(CheckWeights())
        assert not any("masks" in line for line in reply.weights[0].checksums)


def test_an_error_of_one_copy_ends_the_step_of_all_and_the_next_one_is_clean() -> None:
    with copies(overlap=True) as replica:
        replica.submit([*several(4), make_request("bad", [POISON, 1])])
        finals = drain(replica)
        assert finals["bad"].finish.error == "OutOfMemory"
        assert finals["r0"].finish.error == "OutOfMemory"
        replica.submit(several())
        expect(drain(replica))


@pytest.mark.parametrize("num", [1, 9], ids=["rowless", "with rows"])
@pytest.mark.parametrize("kind", ["leave", "broken", "late"])
def test_a_rank_that_leaves_in_a_step_is_named_by_its_copy(kind: str, num: int) -> None:
    """One request is of the first copy, so the step of the others has no rows."""
    with copies(f"{kind} 2") as replica:
        replica.submit(several(num))
        outputs = drain(replica)
        assert {output.finish.error for output in outputs.values()} == {"EngineDead"}
        message = outputs["r0"].finish.message
        assert "rank 2 (dp 2, tp 0) (process" in message
        if kind != "leave":
            assert "ZeroDivisionError" in message
        with pytest.raises(EngineDead, match="rank 2"):
            replica.send(BeginUpdate(version=1))
        # The thread that noticed ends the others.
        for process in processes(replica):
            process.wait(SILENT_S)


def test_a_rank_that_stalls_in_a_step_without_rows_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a CPU the whole step runs in its launch, whose deadline is the one of the result.
    monkeypatch.setattr("engine.protocol.deadlines.LAUNCH_S", 6.0)
    with copies("stall 1", ParallelConfig(dp_size=2, timeout_s=6.0)) as replica:
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "rank 1 (dp 1, tp 0) did not launch step 0 within 6 s" in message


def test_a_rank_killed_while_idle_is_named_by_the_next_call() -> None:
    with copies() as replica:
        process = processes(replica)[1]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "rank 2 (dp 2, tp 0)" in message and "was killed by signal 9" in message


def test_an_update_that_one_copy_refuses_names_it() -> None:
    with copies("begins 1") as replica:
        with pytest.raises(WeightUpdateError, match=r"rank 1: .*cannot begin.*the other 2 of 3"):
            replica.send(BeginUpdate(version=1))
        replica.submit(several())
        expect(drain(replica))


def test_a_commit_that_one_copy_did_not_make_ends_the_replica() -> None:
    with copies("uncommitted 1") as replica:
        replica.send(BeginUpdate(version=1))
        with pytest.raises(EngineDead, match=r"not by rank 1 \(dp 1, tp 0\): .*mixture"):
            replica.send(CommitUpdate(version=1))


def test_copies_with_other_checksums_end_the_replica() -> None:
    """The fake's checksums are what it was told: one of its ranks is told more."""
    with copies() as replica:
        replica._leader._executor._local._trace.append("something else")
        with pytest.raises(EngineDead, match=r"holds other values of '0 something else'") as caught:
            replica.send(CheckWeights())
        assert caught.value.field == "rank 1"
        assert ends_with(replica)[0] == "EngineDead"


def report(rank: int, **checksums: int) -> WeightsReport:
    return WeightsReport(rank=rank, checksums=checksums)


def test_ranks_are_compared_with_the_same_rank_of_the_first_copy() -> None:
    parallel = ParallelConfig(dp_size=2, tp_size=2)
    alike = [report(0, w=1), report(1, w=2), report(2, w=1), report(3, w=2)]
    assert difference(alike, parallel) is None
    assert difference([report(0, w=1), report(1, w=2)], ParallelConfig(tp_size=2)) is None
    other = difference([*alike[:3], report(3, w=1)], parallel)
    assert other is not None and other.field == "rank 3"
    assert "rank 3 (dp 1, tp 1) holds other values of 'w' than rank 1 (dp 0, tp 1)" in str(other)


@pytest.mark.parametrize("field", ["tp_size", "dp_size"])
def test_no_ranks_at_all_are_refused_by_field(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_executor(config_of(parallel=ParallelConfig(**{field: 0})), FACTORY)
    assert caught.value.field == f"parallel.{field}"
