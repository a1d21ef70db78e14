"""A guarded command ends with whoever holds the guard's stdin, and its exit code is the guard's."""

from __future__ import annotations

import signal
import subprocess
import sys

from rollout.replica.python_child import child_command
from tests.helpers.children import ROOT, child_environment
from tests.helpers.serve_process import gone

SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def guarded(code: str) -> subprocess.Popen[str]:
    words = child_command("recipes.actors.guard_main", sys.executable, "-c", code)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, env=child_environment(), text=True, **pipes)


def test_the_end_of_stdin_ends_the_command() -> None:
    with guarded(SLEEPER) as guard:
        assert guard.stdin is not None and guard.stdout is not None
        pid = int(guard.stdout.readline())
        guard.stdin.close()
        assert guard.wait(60) == -signal.SIGTERM % 256
    assert gone(pid)


def test_a_guard_that_is_killed_takes_the_command_with_it() -> None:
    with guarded(SLEEPER) as guard:
        assert guard.stdout is not None
        pid = int(guard.stdout.readline())
        guard.kill()
    assert gone(pid)


def test_the_exit_code_is_the_commands() -> None:
    with guarded("raise SystemExit(7)") as guard:
        assert guard.wait(60) == 7
