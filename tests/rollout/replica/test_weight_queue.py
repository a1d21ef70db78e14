"""Which weight commands run beside steps and which wait, over ranks that answer when told to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.errors import GroupError, SlipstreamError, UpdateOrder, UpdateTimeout
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    FlushCache,
    GetState,
    JoinGroup,
    LeaveGroup,
    LoadFromDisk,
    Pause,
    ReceiveBroadcast,
    ReleaseMemory,
    Reply,
    Resume,
    SetVersion,
)
from rollout.replica.leader import Leader
from rollout.replica.weight_queue import Ticket
from tests.helpers.fake_executor import FakeExecutor, expected_tokens
from tests.helpers.replicas import fake_config, make_request

JOIN = JoinGroup(name="g", address="h", port=1, rank_offset=1, world_size=2)
RECEIVE = ReceiveBroadcast(group="g", tensors=[])


class Held:
    """A command beside steps that ends when the test says so."""

    def __init__(self, command: Any) -> None:
        self.command = command
        self.outcome: Reply | Exception | None = None

    def done(self) -> bool:
        return self.outcome is not None

    def result(self) -> Reply:
        assert self.outcome is not None
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class HoldingExecutor(FakeExecutor):
    """Starts what runs beside steps and leaves it there. `mode`: of every update."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.beside: list[Held] = []
        self.handled: list[str] = []
        self.cancelled: list[tuple[str, str]] = []
        self.mode = "shadow"

    def start(self, command: Any) -> Any:
        self.beside.append(Held(command))
        return self.beside[-1]

    def cancel(self, reason: str, *, group: str = "") -> None:
        self.cancelled.append((reason, group))

    def handle(self, command: Any) -> Reply:
        self.handled.append(type(command).__name__)
        reply = super().handle(command)
        if isinstance(command, BeginUpdate) and self.mode != "shadow":
            return msgspec.structs.replace(reply, in_place=True, undo=self.mode == "undo")
        return reply


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Leader, HoldingExecutor]]:
    config = fake_config(overlap=request.param)
    executor = HoldingExecutor(config)
    yield Leader(config, executor), executor


def tokens_of(leader: Leader, steps: int) -> int:
    """Output tokens of that many steps."""
    before = leader.state().num_output_tokens
    for _ in range(steps):
        leader.step()
    return leader.state().num_output_tokens - before


def run(leader: Leader, *rids: str, count: int = 100) -> None:
    leader.submit(
        [make_request(rid, [i + 1, 2], max_new_tokens=count) for i, rid in enumerate(rids)]
    )
    leader.step()
    leader.step()


@pytest.mark.parametrize("command", [JOIN, LoadFromDisk(path="5"), RECEIVE, LeaveGroup(name="g")])
def test_steps_and_commands_go_on_beside(
    pair: tuple[Leader, HoldingExecutor], command: Any
) -> None:
    leader, executor = pair
    run(leader, "a", "b", "c")
    leader.handle(BeginUpdate(version=3))
    ticket = leader.start(command)
    assert not ticket.done() and leader.busy()
    assert leader.state().receiving == [ticket.name]
    assert tokens_of(leader, 20) >= 3 * 19
    leader.handle(Pause(mode="keep"))
    leader.handle(Resume())
    leader.submit([make_request("d", [9, 9], max_new_tokens=2)])
    finals = [o.rid for _ in range(10) for o in leader.step() if o.finish]
    assert finals == ["d"]
    executor.beside[0].outcome = Reply()
    leader.poll()
    assert ticket.result() == Reply()
    assert leader.state().receiving == [] and not leader.busy()


def test_commit_waits_for_the_transfers_before_it_and_steps_do_not(
    pair: tuple[Leader, HoldingExecutor],
) -> None:
    leader, executor = pair
    run(leader, "a")
    leader.handle(BeginUpdate(version=3))
    given = [RECEIVE, LoadFromDisk(path="5"), CommitUpdate(version=3), CheckWeights(), RECEIVE]
    tickets = [leader.start(command) for command in given]
    assert [held.command for held in executor.beside] == given[:2]
    assert leader.state().receiving == [ticket.name for ticket in tickets]
    assert leader.state().version == 0
    assert tokens_of(leader, 10) >= 9
    for held in executor.beside[:2]:
        held.outcome = Reply()
    leader.step()
    assert [ticket.done() for ticket in tickets] == [True] * 4 + [False]
    assert leader.state().version == 3
    assert executor.handled == ["BeginUpdate", "CommitUpdate", "CheckWeights"]


def test_a_transfer_waits_for_its_group_and_for_no_other(
    pair: tuple[Leader, HoldingExecutor],
) -> None:
    leader, executor = pair
    leader.handle(BeginUpdate(version=3))
    leader.start(JOIN)
    other = leader.start(msgspec.structs.replace(RECEIVE, group="x"))
    ticket = leader.start(RECEIVE)
    assert [type(held.command).__name__ for held in executor.beside] == [
        "JoinGroup",
        "ReceiveBroadcast",
    ]
    executor.beside[0].outcome = Reply()
    leader.poll()
    assert executor.beside[2].command == RECEIVE
    executor.beside[1].outcome = executor.beside[2].outcome = Reply()
    leader.poll()
    assert other.done() and ticket.done()
    assert leader.state().groups == ["g"]


def test_an_abort_ends_the_transfers_before_it(pair: tuple[Leader, HoldingExecutor]) -> None:
    leader, executor = pair
    run(leader, "a")
    leader.handle(BeginUpdate(version=3))
    receive, join = leader.start(RECEIVE), leader.start(msgspec.structs.replace(JOIN, name="x"))
    abort = leader.start(AbortUpdate(version=3))
    assert executor.cancelled == [("the update to version 3 was aborted", "")]
    assert not abort.done()
    assert tokens_of(leader, 5) >= 4
    executor.beside[0].outcome = UpdateTimeout("cancelled")
    leader.step()
    assert abort.result() == Reply() and not join.done()
    with pytest.raises(UpdateTimeout):
        receive.result()
    assert leader.state().open_update is None


@pytest.mark.parametrize("mode", ["undo", "in_place"])
def test_a_transfer_that_fails_in_place_aborts_what_requests_wait_for(
    pair: tuple[Leader, HoldingExecutor], mode: str
) -> None:
    leader, executor = pair
    executor.mode = mode
    leader.submit([make_request("a", [1, 2])])
    leader.handle(BeginUpdate(version=3))
    tickets = [leader.start(RECEIVE), leader.start(RECEIVE), leader.start(CommitUpdate(version=3))]
    assert tokens_of(leader, 5) == 0
    assert leader.handle(GetState()).state is not None
    executor.beside[0].outcome = GroupError("gone")
    leader.step()
    # The other is told to end, and only then is the update put back.
    assert executor.cancelled and executor.handled == ["BeginUpdate"]
    executor.beside[1].outcome = GroupError("cancelled")
    leader.step()
    assert executor.handled[1] == "AbortUpdate"
    for ticket in tickets:
        with pytest.raises(SlipstreamError):
            ticket.result()
    finals = {o.rid: o for _ in range(20) for o in leader.step() if o.finish}
    assert finals["a"].token_ids.tolist() == expected_tokens([1, 2], 8)


def test_an_undo_update_whose_time_is_up_is_aborted_while_its_transfer_hangs(
    pair: tuple[Leader, HoldingExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, executor = pair
    executor.mode = "undo"
    leader.handle(BeginUpdate(version=3))
    receive = leader.start(RECEIVE)
    monkeypatch.setattr(leader._readiness, "_deadline", 0.0)
    for _ in range(3):
        leader.step()
    assert executor.cancelled == [("the update to version 3 was aborted", "")]
    executor.beside[0].outcome = UpdateTimeout("cancelled")
    leader.step()
    assert executor.handled == ["BeginUpdate", "AbortUpdate"]
    with pytest.raises(UpdateTimeout):
        receive.result()


def test_memory_and_versions_wait_for_transfers_too(pair: tuple[Leader, HoldingExecutor]) -> None:
    leader, executor = pair
    leader.handle(BeginUpdate(version=3))
    leader.start(RECEIVE)
    later = [leader.start(ReleaseMemory(tags=["kv_cache"])), leader.start(SetVersion(version=9))]
    assert not any(ticket.done() for ticket in later)
    leader.handle(FlushCache())
    executor.beside[0].outcome = Reply()
    leader.poll()
    assert all(ticket.done() for ticket in later)
    assert leader.state().version == 9


def test_what_cannot_start_is_that_command_s_error(
    pair: tuple[Leader, HoldingExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, executor = pair

    def broken(command: Any) -> Any:
        raise KeyError("ours")

    monkeypatch.setattr(executor, "start", broken)
    with pytest.raises(SlipstreamError, match="join_group"):
        leader.handle(JOIN)
    assert not leader.busy()
    with pytest.raises(UpdateOrder):
        leader.handle(CommitUpdate(version=1))


def test_closing_ends_what_is_in_progress(pair: tuple[Leader, HoldingExecutor]) -> None:
    leader, executor = pair
    leader.start(RECEIVE)
    leader.close()
    assert executor.cancelled == [("the engine is closing", "")]
    assert executor.closed


def test_a_ticket_keeps_its_reply() -> None:
    ticket = Ticket(GetState())
    assert not ticket.done()
    ticket.settle(lambda: Reply(id=4))
    assert ticket.result().id == 4 and ticket.done()
