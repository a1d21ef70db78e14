"""Every limit ends a program, and costs the next one nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from recipes.sandbox.program import Limits
from recipes.sandbox.sandbox import Sandbox
from tests.helpers.sandboxes import open_sandbox, run

pytestmark = pytest.mark.slow

LIMITS = Limits(
    cpu_s=1,
    wall_s=300.0,
    memory_bytes=512 << 20,
    file_bytes=1 << 20,
    folder_bytes=4 << 20,
    folder_entries=100,
    threads=8,
    output_bytes=1 << 16,
)
ENDS = {
    "spin": ("while True: pass", "cpu"),
    "spin in C": ("sum(range(10**12))", "cpu"),
    "spin that ignores signals": (
        "import signal\nfor n in (24, 15, 2): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "cpu",
    ),
    "1 GB of output": ("import os\nfor _ in range(1 << 14): os.write(1, bytes(1 << 16))", "output"),
    "1 GB of errors": ("import os\nfor _ in range(1 << 14): os.write(2, bytes(1 << 16))", "output"),
    "many files": (
        "import time\nfor i in range(1 << 20):\n open(f'{i}', 'w').close()\n time.sleep(1e-4)",
        "disk",
    ),
    "a full folder": (
        "import os, time\nfor i in range(64):\n open(f'{i}', 'wb').write(bytes(1 << 20))\n"
        " time.sleep(0.01)",
        "disk",
    ),
    "threads": (
        "import threading, time\nthreading.stack_size(1 << 16)\nfor _ in range(64):\n"
        " threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\ntime.sleep(1000)",
        "threads",
    ),
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = open_sandbox(LIMITS)
    yield made
    made.close()


@pytest.mark.parametrize("name", ENDS)
def test_a_limit_ends_a_program(sandbox: Sandbox, name: str) -> None:
    code, ended = ENDS[name]
    outcome = run(sandbox, code)
    assert outcome.ended == ended and not outcome.finished
    assert len(outcome.stdout) + len(outcome.stderr) <= 2 * LIMITS.output_bytes
    assert run(sandbox, "print(1)").stdout == "1\n"


def test_a_program_that_waits_is_ended_by_the_clock() -> None:
    made = open_sandbox(Limits(wall_s=0.5))
    for code in ("import time; time.sleep(1000)", "import threading; threading.Event().wait()"):
        assert run(made, code).ended == "wall"
    made.close()


@pytest.mark.parametrize(
    "code,error",
    [
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "MemoryError"),
        ("open('a', 'wb').write(bytes(2 << 20))", "File too large"),
        ("[open(f'{i}', 'w') for i in range(64)]\n", "Too many open files"),
        ("f = lambda: f()\nf()", "RecursionError"),
        ("print('a'", "SyntaxError"),
        ("a\0b", "null bytes"),
        ("import os; raise SystemExit('no')", "no"),
    ],
)
def test_an_error_of_a_program_is_its_own(sandbox: Sandbox, code: str, error: str) -> None:
    outcome = run(sandbox, code)
    assert outcome.ended == "exit" and outcome.code == 1
    assert error in outcome.stderr


def test_a_crash_is_a_signal(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "import ctypes; ctypes.string_at(0)")
    assert (outcome.ended, outcome.code) == ("signal", signal.SIGSEGV)


def test_a_deep_and_closed_folder_is_removed(sandbox: Sandbox) -> None:
    outcome = run(
        sandbox,
        "import os\nfor _ in range(90):\n os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "os.symlink('/usr', 'link'); os.mkdir('closed', 0)\nprint('done')",
    )
    assert outcome.stdout == "done\n"
