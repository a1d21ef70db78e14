"""How spawned processes end: their own code and words, whatever would crash at exit."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.children import ROOT, child_environment

CODE = """
import atexit, logging, os, sys
from rollout.replica.leave import run_and_leave

def main(arguments):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.info("the last message")
    if arguments[0] == "raise":
        raise ZeroDivisionError("not ours")
    atexit.register(os.abort if arguments[0] != "0" else print, "at exit")
    sys.stdout.write("buffered ")
    return int(arguments[0])

run_and_leave(main, sys.argv[1:])
"""


@pytest.mark.parametrize("code", [0, 3])
def test_the_code_is_that_of_main_and_a_failure_tears_nothing_down(code: int) -> None:
    done = leave(str(code))
    assert (done.returncode, done.stdout) == (code, "buffered " if code else "buffered at exit\n")
    assert done.stderr == "the last message\n"


def test_an_error_leaves_its_traceback() -> None:
    done = leave("raise")
    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError: not ours") == 1
    assert "Traceback" in done.stderr


def leave(how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, how],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
