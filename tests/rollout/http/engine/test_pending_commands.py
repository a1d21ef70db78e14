"""Which of the commands that wait for a reply are late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from engine.errors import EngineDead
from engine.protocol import Command, GetState, JoinGroup, LoadFromDisk, Pause, Reply
from rollout.http.engine.pending_commands import AwaitedReplies
from tests.helpers.http_app import run

JOIN = JoinGroup(name="g", address="h", port=1, rank_offset=1, world_size=2)


class Bench:
    """Commands sent at given times; fast ones have 10 s, others 100 s."""

    def __init__(self) -> None:
        self.pending = AwaitedReplies()
        self.last = 0
        self.futures: list[asyncio.Future[Reply]] = []

    def send(self, command: Command, at: float) -> int:
        self.last += 1
        limit_s = 10.0 if isinstance(command, GetState | Pause) else 100.0
        self.futures.append(self.pending.add(self.last, command, at, limit_s))
        return self.last

    def late(self, now: float) -> list[Command]:
        return [entry.command for entry in self.pending.take_late(now)]


def on_a_loop(test: Callable[[Bench], None]) -> Callable[[], None]:
    def wrapped() -> None:
        async def go() -> None:
            test(Bench())

        run(go)

    return wrapped


@on_a_loop
def test_a_command_is_late_after_its_own_deadline(bench: Bench) -> None:
    bench.send(Pause(), 0)
    assert bench.late(10) == []
    assert bench.late(11) == [Pause()]
    assert bench.late(1000) == []


@on_a_loop
def test_a_command_behind_a_slow_one_has_its_time_after_it(bench: Bench) -> None:
    slow = bench.send(LoadFromDisk(path="p"), 0)
    bench.send(Pause(), 1)
    assert bench.late(50) == []
    assert bench.late(90) == []
    bench.pending.answered(slow)
    assert bench.late(91) == []
    assert bench.late(100) == []
    assert bench.late(102) == [Pause()]


@on_a_loop
def test_many_commands_in_a_queue_are_late_by_themselves_only(bench: Bench) -> None:
    """Each answer shows that the leader goes on; none is late because others were first."""
    calls = [bench.send(Pause(), 0) for _ in range(30)]
    for second, call in enumerate(calls):
        assert bench.late(float(second)) == []
        bench.pending.answered(call)
    assert len(bench.pending) == 0


@on_a_loop
def test_what_overtakes_a_slow_command_is_not_excused_by_it(bench: Bench) -> None:
    bench.send(JOIN, 0)
    state = bench.send(GetState(), 1)
    bench.pending.answered(state)
    bench.send(Pause(), 5)
    assert bench.late(6) == []
    assert bench.late(17) == [Pause()], "the join runs beside, so the leader should have answered"
    assert bench.late(101) == [JOIN]


@on_a_loop
def test_an_unknown_reply_changes_nothing(bench: Bench) -> None:
    bench.send(Pause(), 0)
    assert bench.pending.answered(77) is None
    assert bench.late(11) == [Pause()]


@on_a_loop
def test_all_fail_at_once(bench: Bench) -> None:
    bench.send(Pause(), 0)
    bench.pending.fail(EngineDead("gone", field="leader"))
    assert len(bench.pending) == 0
    with pytest.raises(EngineDead, match="gone"):
        bench.futures[0].result()
