"""The sandbox from outside: outcomes, asserts, several programs at once, machines that lack it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.sandbox.kernel import SandboxReport, load_libc, probe
from recipes.sandbox.program import Limits, Program
from recipes.sandbox.sandbox import Sandbox
from tests.helpers.sandboxes import open_sandbox, pids, run

ROOT = Path(__file__).parents[3]
WHOLE = SandboxReport(system="Linux", landlock=7, seccomp=True)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = open_sandbox(num_processes=2)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "code,passed",
    [
        ("def f(x): return x + 1", (True, False, True)),
        ("def f(x): return x\nimport sys; sys.exit(0)", (False, True, True)),
        ("f = 1", (False, False, True)),
        ("import os; os._exit(0)", (False, False, False)),
        ("def f(x): raise SystemExit", (False, False, True)),
        ("raise ValueError", (False, False, False)),
        ("import builtins, os, json\nos.write = os.read = json.loads = print\nf = int", (0, 1, 1)),
        ("import os; os.write(4, b'ran\\n0\\n1\\n2\\n'); os._exit(0)", (False, False, False)),
    ],
)
def test_asserts(sandbox: Sandbox, code: str, passed: tuple[bool, ...]) -> None:
    outcome = run(sandbox, code, asserts=("assert f(1) == 2", "assert f(1) == 1", "assert True"))
    assert outcome.passed == passed


@pytest.mark.slow
def test_a_program_does_not_hold_its_asserts(sandbox: Sandbox) -> None:
    code = """
import gc, sys
backwards, frame, held = "714neddih", sys._getframe(), []
while frame:
    held += [repr(frame.f_locals), repr(frame.f_globals.get("mine"))]
    frame = frame.f_back
held += [repr(o) for o in gc.get_objects() if type(o) in (tuple, list, dict)]
print(any(backwards[::-1] in text for text in held), len(held) > 1000)
"""
    outcome = run(sandbox, code, asserts=("hidden417 = 1",))
    assert (outcome.stdout, outcome.passed) == ("False True\n", (True,))


@pytest.mark.slow
def test_long_asserts_and_input_arrive(sandbox: Sandbox) -> None:
    long = "x" * (1 << 20)
    assert run(sandbox, "", asserts=(f"assert len({long!r}) == {len(long)}",)).passed == (True,)
    assert run(sandbox, "print(len(input()))", stdin=long).stdout == f"{len(long)}\n"
    assert run(sandbox, "print(input())", stdin="\ud800").stdout != "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code,exit_code,stdout",
    [
        ("import atexit; atexit.register(print, 'last'); print('first')", 0, "first\nlast\n"),
        ("import sys; print(1); sys.exit(3)", 3, "1\n"),
        ("print(1); raise KeyError", 1, "1\n"),
        ("import sys; sys.stdout.close()", 0, ""),
        ("import sys; sys.stdout = None", 0, ""),
        ("import os; print(1, end='', flush=True); os._exit(7)", 7, "1"),
    ],
)
def test_a_program_ends_as_python_does(
    sandbox: Sandbox, code: str, exit_code: int, stdout: str
) -> None:
    outcome = run(sandbox, code)
    assert (outcome.ended, outcome.code, outcome.stdout) == ("exit", exit_code, stdout)
    assert outcome.finished == (exit_code == 0)


@pytest.mark.slow
def test_outcomes_are_those_of_their_programs(sandbox: Sandbox) -> None:
    async def many() -> list[str]:
        programs = [Program(code=f"print({number})") for number in range(12)]
        return [o.stdout for o in await asyncio.gather(*(sandbox.run(p) for p in programs))]

    assert asyncio.run(many()) == [f"{number}\n" for number in range(12)]


@pytest.mark.slow
def test_a_supervisor_that_dies_is_replaced() -> None:
    made = open_sandbox()
    (pid,) = pids(made)

    async def killed() -> str:
        running = asyncio.create_task(made.run(Program(code="import time; time.sleep(1000)")))
        while not Path(f"/proc/{pid}/task/{pid}/children").read_text():
            await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        return (await running).failed

    assert "died" in asyncio.run(killed())
    assert run(made, "print(1)").stdout == "1\n"
    made.close()
    made.close()


def test_what_a_kernel_lacks_is_named() -> None:
    assert WHOLE.missing == ()
    bare = SandboxReport(system="Linux 4.4", landlock=0, seccomp=False)
    assert "Landlock" in bare.missing[0] and "seccomp" in bare.missing[1]
    assert str(bare) == "Linux 4.4: no Landlock, no seccomp filters"
    leaky = SandboxReport(system="Linux", landlock=7, seccomp=True, leaks=("sockets",))
    assert leaky.missing == ("a refusal of sockets",)
    assert probe(load_libc()).leaks == ()


BARE = """
import dataclasses, sys
from recipes.sandbox import supervisor
real = supervisor.probe
supervisor.probe = lambda libc: dataclasses.replace(real(libc), **KEPT)
mine = supervisor.main(LIMITS)
if mine is not None:
    supervisor.inside.run(mine.code, has_asserts=mine.has_asserts)
"""


def bare_sandbox(
    monkeypatch: pytest.MonkeyPatch, policy: str, *, kept: dict[str, object], limits: Limits
) -> Sandbox:
    """A sandbox on a machine that has only what is kept."""
    import dataclasses

    from recipes.sandbox import sandbox as module

    code = BARE.replace("KEPT", repr(kept)).replace("LIMITS", repr(dataclasses.asdict(limits)))
    monkeypatch.setattr(module, "child_command", lambda *_: [sys.executable, "-c", code])
    return Sandbox(policy=policy, limits=limits, num_processes=1)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
@pytest.mark.parametrize(
    "kept,named",
    [
        ({"landlock": 0, "seccomp": False}, "Landlock.*seccomp filters"),
        ({"landlock": 0}, "Landlock"),
        ({"seccomp": False}, "seccomp filters"),
    ],
)
def test_a_machine_that_cannot_confine_is_refused(
    monkeypatch: pytest.MonkeyPatch, kept: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"{named}.*--sandbox best-effort") as caught:
        bare_sandbox(monkeypatch, "require", kept=kept, limits=Limits())
    assert caught.value.field == "sandbox"


ESCAPE = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
print("parent", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="others may not fork there")
def test_best_effort_leaves_no_process_either(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bare_sandbox(
        monkeypatch, "best-effort", kept={"landlock": 0, "seccomp": False}, limits=Limits()
    )
    outcome = run(made, ESCAPE)
    made.close()
    assert outcome.stdout == "parent\n"
    assert {"sockets", "new processes"} <= set(made.report.leaks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
def test_what_the_kernel_only_claims_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first program is run to see: here the filter is there, and Landlock is not."""
    made = bare_sandbox(monkeypatch, "best-effort", kept={"landlock": 0}, limits=Limits())
    made.close()
    assert made.report.leaks == ("reading other files", "writing other files")


@pytest.mark.slow
def test_a_supervisor_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "recipes.sandbox.sandbox.child_command", lambda *_: [sys.executable, "-c", ""]
    )
    with pytest.raises(InvalidRequest, match="does not start"):
        Sandbox(num_processes=1)


@pytest.mark.slow
def test_a_supervisor_imports_little() -> None:
    """It is forked for every program, and what it holds is what a program could look at."""
    code = "import sys, recipes.sandbox.supervisor; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_no_folder_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    made = open_sandbox()
    assert len(list(tmp_path.iterdir())) == 1

    async def closed() -> str:
        running = asyncio.create_task(made.run(Program(code="import time; time.sleep(1000)")))
        while not list(tmp_path.glob("*/program")):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(made.close)
        return (await running).failed

    assert "closed" in asyncio.run(closed())
    assert "closed" in made.submit(Program(code="")).result().failed
    assert list(tmp_path.iterdir()) == []
