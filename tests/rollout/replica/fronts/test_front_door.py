"""Several callers of one leader: everybody gets what he asked for, and nobody what another did."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.protocol import (
    Abort,
    Call,
    FinishReason,
    FlushCache,
    FrontGone,
    GetState,
    LeaderMessage,
    Pause,
    Reply,
    Request,
    RequestOutput,
    TokenRows,
    encode,
)
from rollout.replica import leader_main
from rollout.replica.columns import from_columns
from rollout.replica.fronts.askers import OWNER, Askers, channel_name
from rollout.replica.fronts.front_door import FrontDoor
from rollout.replica.ipc import Channel, Hub
from rollout.replica.leader import Leader
from rollout.requests.sample_ids import sample_id
from tests.helpers.fake_executor import FakeExecutor, expected_tokens
from tests.helpers.replicas import fake_config, make_request

ANSWERS = RequestOutput | TokenRows | Reply
PATIENCE_S = 30.0


def nothing_of(rid: str) -> RequestOutput:
    ids = np.zeros(0, np.int32)
    return RequestOutput(rid=rid, start=0, token_ids=ids, logprobs=ids.astype(np.float32))


class Callers:
    """A leader of the fake engine, its owner and fronts that join it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ends = {OWNER: Channel.listen(f"ipc://{folder}/owner", ANSWERS)}
        inside = Channel.connect(f"ipc://{folder}/owner", LeaderMessage)
        self.hub = Hub(f"ipc://{folder}/hub", LeaderMessage)
        self.door = FrontDoor(inside, self.hub)
        self.leader = Leader(fake_config(), FakeExecutor(fake_config()))

    def join(self, name: str) -> None:
        name_there = channel_name(name, 1)
        self.ends[name] = Channel.join(f"ipc://{self._folder}/hub", ANSWERS, name_there)

    def send(self, name: str, *messages: Any) -> None:
        self.ends[name].send(messages, timeout_s=PATIENCE_S)

    def taken(self, count: int) -> list[Any]:
        """The next messages that the leader is to take in, at least so many."""
        found: list[Any] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count:
            assert time.monotonic() < deadline, found
            found += self.door.receive_waiting(timeout_s=0.1, max_messages=100)
        return found

    def turn(self, count: int = 1) -> None:
        """One turn of the leader's loop, with at least `count` messages, and a step."""
        answers, _ = leader_main._obey(self.leader, self.taken(count), {})
        self.door.send(answers)
        self.step()

    def step(self) -> None:
        outputs = self.leader.step()
        if outputs:
            self.door.send(outputs)

    def finish(self) -> None:
        while self.leader.can_step():
            self.step()

    def got(self, name: str, count: int) -> list[Any]:
        """The next answers of a caller, so many; and that no further one has come by then."""
        found: list[Any] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count:
            assert time.monotonic() < deadline, found
            found += from_columns(self.ends[name].receive(timeout_s=0.1))
        assert len(found) == count, found
        return found

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
        self.door.close(linger_s=0.0)


@pytest.fixture
def callers(tmp_path: Path) -> Iterator[Callers]:
    found = Callers(tmp_path)
    found.join("a")
    found.join("b")
    yield found
    found.close()


def test_calls_of_one_number_are_each_answered_to_their_caller(callers: Callers) -> None:
    for name in (OWNER, "a", "b"):
        callers.send(name, Call(id=1, command=GetState()))
        callers.send(name, make_request(f"of-{name}", [5, len(name)], max_new_tokens=6))
    callers.turn(6)
    callers.finish()
    for name in (OWNER, "a", "b"):
        state, output = callers.got(name, 2)
        assert (state.id, state.state is not None) == (1, True)
        assert output.rid == f"of-{name}"
        assert output.token_ids.tolist() == expected_tokens([5, len(name)], 6)


def test_an_id_in_use_is_refused_to_another_caller_alone(callers: Callers) -> None:
    callers.send("a", make_request("same", [5], max_new_tokens=6))
    callers.turn()
    callers.send("b", make_request("same", [6]))
    assert callers.door.receive_waiting(timeout_s=0.5, max_messages=9) == []
    (refused,) = callers.got("b", 1)
    assert (refused.finish.type, refused.finish.error) == ("abort", "InvalidRequest")
    callers.finish()
    (output,) = callers.got("a", 1)
    assert output.token_ids.tolist() == expected_tokens([5], 6)
    # It is free again.
    callers.send("b", make_request("same", [6], max_new_tokens=2))
    callers.turn()
    callers.finish()
    assert callers.got("b", 1)[0].token_ids.tolist() == expected_tokens([6], 2)


def test_a_caller_that_ends_a_request_may_use_its_id_at_once(callers: Callers) -> None:
    callers.send("a", make_request("same", [5], max_new_tokens=60))
    callers.turn()
    again = make_request("same", [6], max_new_tokens=2)
    callers.send("a", Call(id=1, command=Abort(rids=["same"])), again)
    callers.turn(2)
    callers.finish()
    _, first, second = callers.got("a", 3)
    assert first.finish.type == "abort"
    assert second.token_ids.tolist() == expected_tokens([6], 2)
    assert len(callers.door._askers) == 0


@pytest.mark.parametrize(
    ("named", "ended"),
    [("q", ["q"]), ("call", ["call-0", "call-1"]), ("call-1", ["call-1"]), ("nobody", [])],
)
def test_the_owner_ends_what_replies_show_under_a_name(
    callers: Callers, named: str, ended: list[str]
) -> None:
    ids = ["q", sample_id("call", 0), sample_id("call", 1)]
    callers.send("a", *(make_request(rid, [5], max_new_tokens=40) for rid in ids))
    callers.turn(3)
    callers.send(OWNER, Call(id=1, command=Abort(rid=named)))
    callers.turn()
    outputs = callers.got("a", len(ended)) if ended else []
    assert [output.rid.replace("\0", "-") for output in outputs] == ended
    assert {output.finish.type for output in outputs} <= {"abort"}


def test_a_front_that_leaves_ends_its_own_requests_alone(callers: Callers) -> None:
    for name in ("a", "b"):
        callers.send(name, make_request(name, [5], max_new_tokens=4))
    callers.turn(2)
    callers.send("a", Call(id=1, command=Abort(all=True)))
    callers.turn()
    callers.finish()
    assert callers.got("a", 2)[1].finish.type == "abort"
    assert callers.got("b", 1)[0].finish.type == "length"


def test_a_front_that_is_gone_leaves_nothing_in_the_engine_after_one_step(
    callers: Callers,
) -> None:
    free = callers.leader.state().free_pages
    for name in ("a", "b"):
        callers.send(
            name, *(make_request(f"{name}{i}", [i + 1], max_new_tokens=40) for i in (1, 2))
        )
    callers.turn(4)
    callers.send("a", make_request("unread", [7], max_new_tokens=40))
    callers.hub.wait(callers.ends[OWNER], timeout_s=PATIENCE_S)
    callers.send(OWNER, FrontGone(name="a"))
    steps = callers.leader.state().num_steps
    callers.turn(2)
    state = callers.leader.state()
    assert (state.num_running + state.num_waiting, state.num_steps) == (2, steps + 1)
    # What it still says is nobody's.
    callers.send("a", make_request("late", [7]))
    assert callers.door.receive_waiting(timeout_s=0.5, max_messages=9) == []
    callers.finish()
    assert [output.finish.type for output in callers.got("b", 2)] == ["length", "length"]
    callers.leader.handle(FlushCache())
    assert callers.leader.state().free_pages == free
    assert len(callers.door._askers) == 0


def test_fronts_send_no_commands_that_steer_the_engine(callers: Callers) -> None:
    callers.send("a", Call(id=3, command=Pause(mode="abort")))
    assert callers.door.receive_waiting(timeout_s=0.5, max_messages=9) == []
    (reply,) = callers.got("a", 1)
    assert (reply.id, reply.error.kind, reply.error.field) == (3, "InvalidRequest", "command")
    assert not callers.leader.state().paused


def test_what_a_front_sent_before_a_command_of_the_owner_comes_before_it(callers: Callers) -> None:
    callers.send("a", make_request("first", [5]))
    callers.hub.wait(callers.ends[OWNER], timeout_s=PATIENCE_S)
    callers.send(OWNER, Call(id=1, command=Pause(mode="abort")))
    found = callers.taken(2)
    assert [type(message) for message in found] == [Request, Call]


def test_what_a_front_says_outside_the_protocol_is_answered_to_it(callers: Callers) -> None:
    callers.send("a", nothing_of("x"))
    assert callers.door.receive_waiting(timeout_s=0.5, max_messages=9) == []
    (refused,) = callers.got("a", 1)
    assert (refused.rid, refused.finish.error) == ("x", "InvalidRequest")


def test_askers_are_forgotten_with_the_last_output() -> None:
    askers = Askers()
    assert askers.admit("a", "1") and askers.admit("b", "2") and not askers.admit("b", "1")
    assert [askers.of_front(name) for name in ("a", "b", OWNER)] == [["1"], ["2"], []]
    assert (askers.take(nothing_of("1")), len(askers)) == ("a", 2)
    end = msgspec.structs.replace(nothing_of("1"), finish=FinishReason(type="stop"))
    assert (askers.take(end), len(askers)) == ("a", 1)
    assert askers.take(end) == OWNER


def rows_of(rids: list[str], sizes: list[int]) -> TokenRows:
    count, total = len(rids), sum(sizes)
    numbers = np.arange(count, dtype=np.int32)
    return TokenRows(
        rids=rids,
        starts=10 * numbers,
        sizes=np.array(sizes, np.int32),
        versions=numbers.astype(np.int64),
        token_ids=np.arange(total, dtype=np.int32),
        logprobs=-np.arange(total, dtype=np.float32),
        counts=np.stack([numbers + i for i in range(4)]),
    )


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [1, 3, 0, 2, 1]])
def test_rows_of_columns_go_to_whoever_asked_for_each(sizes: list[int]) -> None:
    askers = Askers()
    rids = ["1", "2", "3", "4", "5"]
    names = dict(zip(rids, ["a", "b", "a", "a", "b"], strict=True))
    for rid, name in names.items():
        askers.admit(name, rid)
    whole = {output.rid: output for output in from_columns([rows_of(rids, sizes)])}
    for _ in range(2):  # the second time their places are known
        parts = dict(askers.parts(rows_of(list(rids), sizes)))
        assert {name: part.rids for name, part in parts.items()} == {
            "a": ["1", "3", "4"],
            "b": ["2", "5"],
        }
        for part in parts.values():
            for output in from_columns([part]):
                assert encode(output) == encode(whole[output.rid])
    end = msgspec.structs.replace(nothing_of("2"), finish=FinishReason(type="stop"))
    askers.take(end)
    askers.admit("a", "2")
    parts = dict(askers.parts(rows_of(list(rids), sizes)))
    assert {name: part.rids for name, part in parts.items()} == {
        "a": ["1", "2", "3", "4"],
        "b": ["5"],
    }
