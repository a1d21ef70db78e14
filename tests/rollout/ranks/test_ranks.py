"""Further ranks in their own processes: what they are sent, what they answer, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.errors import (
    EngineDead,
    InvalidRequest,
    OutOfMemory,
    UnsupportedOption,
    UpdateOrder,
    WeightUpdateError,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    ErrorInfo,
    JoinGroup,
    LoadFromDisk,
    ReceiveBroadcast,
    Reply,
    RequestOutput,
    UpdateReport,
)
from engine.protocol.deadlines import MAX_TIMEOUT_S, SILENT_S, START_S, watch_s
from rollout.ranks.board import StepBoard
from rollout.ranks.ranked_executor import RankedExecutor, build_executor
from rollout.ranks.replies import merge
from rollout.replica.base import Replica
from rollout.replica.inline import InlineReplica
from rollout.replica.leader import Leader
from rollout.replica.spawned import ProcessReplica
from tests.helpers.children import ROOT, child_environment
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.mask_sources import ScriptedSource
from tests.helpers.peers import until
from tests.helpers.replicas import fake_config, make_request

pytestmark = pytest.mark.slow

FACTORY = "tests.helpers.fake_ranks:build"


def config_of(model: str = "fake", tp_size: int = 2, timeout_s: float = 30.0) -> EngineConfig:
    parallel = ParallelConfig(tp_size=tp_size, timeout_s=timeout_s)
    return replace(fake_config(model), parallel=parallel)


def ranked(model: str = "fake", tp_size: int = 2, timeout_s: float = 30.0) -> InlineReplica:
    """Rank 0 in this process, the others spawned."""
    config = config_of(model, tp_size, timeout_s)
    return InlineReplica(config, build_executor(config, FACTORY))


def processes(replica: InlineReplica) -> list[subprocess.Popen[bytes]]:
    return [rank._process for rank in replica._leader._executor._ranks]


def drain(replica: Replica) -> dict[str, RequestOutput]:
    """Final outputs by id, by when a leader that stands still would be ended."""
    final: dict[str, RequestOutput] = {}

    def idle() -> bool:
        if not replica.idle():
            final.update((o.rid, o) for o in replica.step() if o.finish is not None)
        return replica.idle()

    until(idle, watch_s(builds=True))
    return final


def ends_with(replica: Replica) -> tuple[str, str]:
    """Submit one request that must be aborted; the error's name and message."""
    replica.submit([make_request("r", [1, 2])])
    finish = drain(replica)["r"].finish
    assert finish is not None
    return finish.error or "", finish.message or ""


def test_every_rank_gets_the_same_plans_and_commands_in_order() -> None:
    with ranked(tp_size=3) as replica:
        replica.submit([make_request("a", [1, 2, 3])])
        assert drain(replica)["a"].token_ids.tolist() == expected_tokens([1, 2, 3], 8)
        replica.send(BeginUpdate(version=1))
        replica.send(LoadFromDisk(path="5"))
        report = replica.send(CommitUpdate(version=1)).report
        assert report is not None
        assert report.num_bytes == 3 * 8
        reply = replica._leader._executor.handle(CheckWeights())
        traces = [list(rank.checksums) for rank in reply.weights]
        assert [rank.rank for rank in reply.weights] == [0, 1, 2]
        assert [memory.used_bytes for memory in reply.memory] == [0, 1, 2]
        assert len(traces[0]) == 8 + 3
        assert traces[0] == traces[1] == traces[2]
        replica.submit([make_request("b", [1, 2, 3])])
        assert drain(replica)["b"].token_ids.tolist() == expected_tokens([1, 2, 3], 8, shift=5)
        started = processes(replica)
    assert [process.poll() for process in started] == [0, 0]


def test_every_rank_gets_masks_behind_their_plan_and_before_the_next() -> None:
    with ranked(tp_size=3) as replica:
        masked = make_request("m", [1, 2, 3], max_new_tokens=3)
        masked = msgspec.structs.replace(masked, allowed_token_ids=np.array([5, 90], np.int32))
        replica.submit([make_request("a", [4, 5], max_new_tokens=3), masked])
        finals = drain(replica)
        assert finals["m"].token_ids.tolist() == expected_tokens([1, 2, 3], 3, allowed=[5, 90])
        assert finals["a"].token_ids.tolist() == expected_tokens([4, 5], 3)
        reply = replica._leader._executor.handle(CheckWeights())
        traces = [list(rank.checksums) for rank in reply.weights]
        row = next(line for line in traces[0] if "masks" in line)[-2]
        steps = [f"step {step}" for step in range(3)]
        masks = [f"masks {step} [{row}]" for step in range(3)]
        told = [line for pair in zip(steps, masks, strict=True) for line in pair]
        assert [line.partition(" ")[2] for line in traces[0]] == told
        assert traces[0] == traces[1] == traces[2]


def test_a_rank_that_leaves_while_masks_are_awaited_is_named() -> None:
    """Nothing waits for the ranks then; whoever misses one is the step that comes next."""

    class Silent(ScriptedSource):
        def ask(self, rows: Any) -> Any:
            (rank,) = processes(replica)
            rank.kill()
            rank.wait()
            return super().ask(rows)

    config = config_of()
    source = Silent(lambda rid, outputs: (3, [1]), prefix="m")
    executor = build_executor(config, FACTORY)
    with InlineReplica(config, executor) as replica:
        replica._leader = Leader(config, executor, mask_sources=[source])
        masked = make_request("m", [1, 2, 3])
        masked = msgspec.structs.replace(masked, allowed_token_ids=np.array([5, 1], np.int32))
        replica.submit([masked])
        finish = drain(replica)["m"].finish
    assert finish is not None and finish.error == "EngineDead"
    assert "rank 1" in str(finish.message)


def test_the_spawned_leader_has_ranks_too() -> None:
    replica = ProcessReplica(config_of(), factory=FACTORY, start_s=START_S)
    with replica:
        assert replica.state().tp_size == 2
        replica.submit([make_request("a", [1, 2, 3])])
        assert drain(replica)["a"].token_ids.tolist() == expected_tokens([1, 2, 3], 8)
    assert not replica._folder.exists()


def test_the_spawned_leader_leaves_when_a_rank_did() -> None:
    replica = ProcessReplica(config_of("leave 1"), factory=FACTORY, start_s=START_S)
    with replica:
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "rank 1" in message
        with pytest.raises(EngineDead, match=r"leader process (?s:.*)rank 1 .*exited with code 5"):
            until(lambda: replica.state() is None, SILENT_S)


def test_one_rank_has_no_processes() -> None:
    executor = build_executor(config_of(tp_size=1), FACTORY)
    assert not isinstance(executor, RankedExecutor)
    with pytest.raises(InvalidRequest) as caught:
        build_executor(config_of(tp_size=0), FACTORY)
    assert caught.value.field == "parallel.tp_size"


def test_an_error_all_ranks_agree_on_is_raised_as_it_is() -> None:
    with ranked() as replica:
        with pytest.raises(UpdateOrder, match=r"^no update is open$") as caught:
            replica.send(CommitUpdate(version=1))
        assert caught.value.field == "version"
        replica.submit([make_request("a", [1, 2])])
        assert len(drain(replica)["a"].token_ids) == 8


def test_an_error_of_one_rank_names_it_and_the_replica_goes_on() -> None:
    with ranked("begins 1") as replica:
        with pytest.raises(WeightUpdateError, match=r"rank 1: .*cannot begin.*the other 1 of 2"):
            replica.send(BeginUpdate(version=1))
        replica.submit([make_request("a", [1, 2])])
        assert len(drain(replica)["a"].token_ids) == 8


def test_a_commit_that_one_rank_did_not_make_ends_the_replica() -> None:
    with ranked("uncommitted 1") as replica:
        replica.send(BeginUpdate(version=1))
        with pytest.raises(EngineDead, match="not by rank 1: the replica would serve a mixture"):
            replica.send(CommitUpdate(version=1))
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "mixture" in message


def test_a_refused_step_leaves_the_ranks_together() -> None:
    with ranked("refuse") as replica:
        assert ends_with(replica)[0] == "NoVersion"
        assert all(process.poll() is None for process in processes(replica))


def test_tensors_of_this_process_are_refused() -> None:
    with ranked() as replica:
        with pytest.raises(UnsupportedOption, match="disk") as caught:
            replica.update_weights_inproc(BeginUpdate(version=1), [("shift", 1)])
        assert caught.value.field == "transport"
        assert replica.state().version == 0


def test_a_rank_that_leaves_in_a_step_is_named() -> None:
    with ranked("leave 1", tp_size=3, timeout_s=MAX_TIMEOUT_S) as replica:
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "rank 1 (process" in message
        assert "exited with code 5" in message
        with pytest.raises(EngineDead, match="rank 1"):
            replica.send(BeginUpdate(version=1))
        assert all(process.poll() is not None for process in processes(replica))


@pytest.mark.slow
def test_a_rank_that_stalls_misses_its_deadline_and_is_named() -> None:
    # Long enough for rank 1, which does not stall, to launch its step.
    with ranked("stall 2", tp_size=3, timeout_s=6.0) as replica:
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "rank 2 did not launch step 0 within 6 s" in message


def test_a_rank_that_breaks_leaves_its_trace_in_the_error() -> None:
    with ranked("broken 1") as replica:
        assert "ZeroDivisionError: not an error of ours" in ends_with(replica)[1]


def test_rank_0_breaking_ends_the_others() -> None:
    with ranked("broken 0") as replica:
        replica.submit([make_request("r", [1, 2])])
        with pytest.raises(EngineDead, match="not an error of ours"):
            drain(replica)
        with pytest.raises(EngineDead, match="rank 0 failed in step 0"):
            replica.send(BeginUpdate(version=1))
        assert all(process.poll() is not None for process in processes(replica))


def test_a_rank_killed_while_idle_is_named_by_the_next_call() -> None:
    with ranked() as replica:
        (process,) = processes(replica)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(SILENT_S)
        kind, message = ends_with(replica)
        assert kind == "EngineDead"
        assert "rank 1" in message and "was killed by signal 9" in message


def test_a_rank_that_never_answers_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in ("_SLOW_S", "AGREE_S", "_MARGIN_S"):
        monkeypatch.setattr(f"engine.protocol.deadlines.{layer}", 0.5)
    with ranked("mute 1", timeout_s=1.0) as replica:
        with pytest.raises(EngineDead, match=r"rank 1 .*did not answer 'begin_update'"):
            replica.send(BeginUpdate(version=1, timeout_s=1.0))
        assert ends_with(replica)[0] == "EngineDead"


def test_a_rank_without_memory_is_typed() -> None:
    with pytest.raises(OutOfMemory, match="no room for a KV cache") as caught:
        ranked("full 1")
    assert caught.value.field == "cache.memory_bytes"


def test_a_rank_that_crashes_while_it_is_built() -> None:
    with pytest.raises(EngineDead, match=r"rank 1 .*exited with code 7"):
        ranked("crash 1")


def test_ranks_leave_when_the_leader_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from tests.rollout.ranks.test_ranks import processes, ranked\n"
        "replica = ranked()\n"
        "print(processes(replica)[0].pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(TMPDIR=str(tmp_path)),
    )
    with leader:
        assert leader.stdout is not None
        rank = int(leader.stdout.readline())
        leader.kill()
    until(lambda: not is_running(rank), SILENT_S)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_closing_leaves_no_process_and_no_files() -> None:
    replica = ranked()
    folder = replica._leader._executor._ranks[0]._log.parent
    started = processes(replica)
    replica.close()
    replica.close()
    assert [process.poll() for process in started] == [0]
    assert not folder.exists()


def test_the_board_knows_who_is_behind(tmp_path: Path) -> None:
    board = StepBoard(tmp_path / "steps", 3, create=True)
    assert board.behind(-1) == []
    StepBoard(tmp_path / "steps", 3).note(1, 4)
    board.note(0, 5)
    assert board.behind(4) == [2]
    assert board.behind(5) == [1, 2]


def error(kind: str, message: str) -> Reply:
    return Reply(error=ErrorInfo(kind=kind, message=message, field="w"))


@pytest.mark.parametrize(
    "replies,expected",
    [
        ([error("UpdateOrder", "x"), error("UpdateOrder", "x")], "x"),
        (
            [error("UpdateOrder", "x"), error("GroupError", "y")],
            "rank 0: UpdateOrder: x; rank 1: GroupError: y",
        ),
        (
            [Reply(), error("UpdateOrder", "x"), Reply()],
            "rank 1: UpdateOrder: x (the other 2 of 3 ranks succeeded)",
        ),
    ],
    ids=["all alike", "different", "one"],
)
def test_errors_are_merged(replies: list[Reply], expected: str) -> None:
    with pytest.raises(UpdateOrder) as caught:
        merge(replies)
    assert caught.value.message == expected
    assert caught.value.field == "w"


def test_reports_are_added_up() -> None:
    def part(num_bytes: int, seconds: float) -> Reply:
        report = UpdateReport(version=3, num_tensors=2, num_bytes=num_bytes, seconds=seconds)
        return Reply(report=report)

    report = merge([part(10, 1.0), part(12, 3.0)]).report
    assert report == UpdateReport(version=3, num_tensors=2, num_bytes=22, seconds=3.0)


JOIN = JoinGroup(name="g", address="h", port=1, rank_offset=1, world_size=3)


@pytest.mark.parametrize("which", [0, 1])
def test_steps_go_on_while_a_rank_forms_a_group(which: int) -> None:
    with ranked(f"forms {which}") as replica:
        ticket = replica._leader.start(JOIN)
        replica.submit([make_request(f"r{i}", [i + 1, 2]) for i in range(4)])
        assert len(drain(replica)) == 4
        assert not ticket.done()
        assert replica.state().receiving == ["join_group"]
        # Other commands are answered out of order.
        replica.send(BeginUpdate(version=1))
        replica.send(AbortUpdate(version=1))


def test_a_rank_that_never_ends_a_command_beside_steps_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for layer in ("_SLOW_S", "AGREE_S", "_MARGIN_S", "ABORT_S"):
        monkeypatch.setattr(f"engine.protocol.deadlines.{layer}", 0.2)
    with ranked("forms 1", timeout_s=0.5) as replica:
        with pytest.raises(EngineDead, match=r"rank 1 .* did not answer 'join_group'"):
            replica.send(msgspec.structs.replace(JOIN, timeout_s=0.2))
        assert replica._leader._executor.failure is not None


def test_a_rank_that_dies_in_a_command_beside_steps_is_named() -> None:
    died = pytest.raises(EngineDead, match=r"rank 1 .* exited with code 9")
    with ranked("forms-dies 1") as replica, died:
        replica.send(JOIN)


def test_transfers_in_progress_are_cancelled_on_every_rank() -> None:
    with ranked("forms 1") as replica:
        leader = replica._leader
        leader.handle(BeginUpdate(version=1))
        receive = leader.start(ReceiveBroadcast(group="g", tensors=[]))
        leader.start(AbortUpdate(version=1))
        assert not receive.done()
        traces = leader._executor.handle(CheckWeights()).weights
        for trace in traces:
            (line,) = [name for name in trace.checksums if "cancel" in name]
            assert "the update to version 1 was aborted" in line
