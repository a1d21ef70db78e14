"""A sandbox for tests, and what is left of one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from recipes.sandbox.kernel import load_libc, probe
from recipes.sandbox.program import Limits, Outcome, Program
from recipes.sandbox.sandbox import Sandbox

QUICK = Limits(cpu_s=2, wall_s=20.0)


def open_sandbox(limits: Limits = QUICK, num_processes: int = 1) -> Sandbox:
    """Skips the test, with what is missing, where this kernel cannot confine a program."""
    missing = probe(load_libc()).missing
    if missing:
        pytest.skip(f"this kernel lacks {' and '.join(missing)}")
    return Sandbox(limits=limits, num_processes=num_processes)


def run(sandbox: Sandbox, code: str, *, stdin: str = "", asserts: tuple[str, ...] = ()) -> Outcome:
    """Run one program; nothing of it may be left."""
    program = Program(code=code, stdin=stdin, asserts=asserts)
    outcome = asyncio.run(sandbox.run(program))
    assert not outcome.failed
    assert_nothing_left(sandbox)
    return outcome


def pids(sandbox: Sandbox) -> list[int]:
    """Of the supervisors that are there."""
    processes = [supervisor._process for supervisor in sandbox._supervisors]
    return [process.pid for process in processes if process is not None]


def assert_nothing_left(sandbox: Sandbox) -> None:
    """No process: every orphan would be a child of its supervisor. No open file, no folder."""
    for pid in pids(sandbox):
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
        targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not [target for target in targets if "sandbox-" in target or "deleted" in target]
        assert len(targets) < 10
