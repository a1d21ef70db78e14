"""Every layer waits longer than the one inside it, for every command there is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import msgspec
import pytest

from engine.protocol import Command, JoinGroup, ReceiveBroadcast
from engine.protocol import deadlines as table
from engine.protocol.deadlines import deadlines

COMMANDS = get_args(Command)
TIMEOUTS = [0.0, -1.0, 1.0, 300.0, 1e9, 1e308, float("inf"), float("nan")]


def make(kind: Any, **given: Any) -> Any:
    """A command with some value for each field that has no default."""
    blank = {str: "x", int: 1, bytes: b"", "PauseMode": "keep"}
    fields = {f.name: blank.get(f.type, []) for f in msgspec.structs.fields(kind) if f.required}
    return kind(**fields, **given)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("collective_s", [1.0, 60.0, 900.0])
def test_outer_waits_longer_than_inner(kind: Any, collective_s: float) -> None:
    timed = kind in (JoinGroup, ReceiveBroadcast)
    for timeout_s in TIMEOUTS if timed else [None]:
        command = make(kind) if timeout_s is None else make(kind, timeout_s=timeout_s)
        found = deadlines(command, collective_s=collective_s)
        for inner, outer in pairwise(found.layers()):
            assert outer >= inner + 10, found
        # A step may be in progress, and a launch is part of it.
        assert found.leader > table.launch_s(collective_s)
        assert found.rank > collective_s
        assert found.operation + table.AGREE_S < found.rank


@pytest.mark.parametrize("kind", [JoinGroup, ReceiveBroadcast])
def test_a_callers_deadline_is_capped(kind: Any) -> None:
    for timeout_s in TIMEOUTS:
        found = deadlines(make(kind, timeout_s=timeout_s))
        assert found.operation <= table.MAX_TIMEOUT_S + table.ABORT_S
        assert 0 <= table.capped(timeout_s) <= table.MAX_TIMEOUT_S


@pytest.mark.parametrize("collective_s", [1.0, 60.0, 900.0])
def test_the_ranks_notice_a_hang_before_whoever_watches_their_leader(collective_s: float) -> None:
    for builds in (False, True):
        inner = table.launch_s(collective_s, builds=builds)
        assert collective_s <= inner < table.watch_s(collective_s, builds=builds)
    assert table.watch_s(collective_s, builds=True) < table.step_s(collective_s)


def test_the_rest_of_the_table() -> None:
    assert table.MEET_S < table.START_AGREE_S < table.START_S
    assert table.launch_s() + table.COLLECTIVE_S < table.REPLY_S
    commands = [make(kind) for kind in COMMANDS if kind not in (JoinGroup, ReceiveBroadcast)]
    assert max(deadlines(command).caller for command in commands) < table.START_S
