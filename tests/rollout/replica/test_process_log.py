"""Why a process ended, read from its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import EngineDead
from rollout.replica.process_log import cause_of_death, log_tail
from tests.helpers.replicas import spawned

TRACEBACK = """2026 leader rollout.replica.leader: loading
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    raise KeyError(0)
    ^^^^^^^^^^^^^^^^^
KeyError: 0

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in step
    run()
torch.OutOfMemoryError: CUDA out of memory.
Tried to allocate 2 GiB
2026 leader rollout.ranks: told the ranks to leave
"""


@pytest.mark.parametrize(
    "log,expected",
    [
        ("", ""),
        ("2026 leader rollout.replica.leader: all is well\n", ""),
        (TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory."),
        ("Traceback (most recent call last):\n  File\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("Fatal Python error: Aborted\n\nThread 1:\n", "Fatal Python error: Aborted"),
        ("Traceback (most recent call last):\n  File cut", ""),
        ("Traceback (most recent call last):\nE: " + "x" * 9000, "E: " + "x" * 497),
    ],
)  # fmt: skip
def test_the_cause_is_the_last_error(log: str, expected: str) -> None:
    assert cause_of_death(log) == expected


def test_a_log_that_was_never_written_is_empty(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "absent") == ""
    (tmp_path / "log").write_bytes(b"x" * 100_000 + b"\xffend")
    assert log_tail(tmp_path / "log").endswith("\ufffdend")
    assert len(log_tail(tmp_path / "log")) == 65536


def test_the_reason_comes_before_the_log() -> None:
    """What a caller reads first, whatever the leader had written."""
    with pytest.raises(EngineDead) as caught:
        spawned("raise")
    first, *_, last = caught.value.message.splitlines()
    assert "exited with code 1: ZeroDivisionError: the cause" in first
    assert last == "ZeroDivisionError: the cause"
