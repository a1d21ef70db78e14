"""Run programs that a model wrote: in processes that can do no harm, several at once.

A program has a folder of its own, the libraries of the interpreter to read, and nothing else: no
other file, no network, no other process, not to start one either. `confine.py` says how; what the
kernel lacks for it is found at the start, and named.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engine.errors import InvalidRequest
from recipes.rewards.graders.frames import read_frame, write_frame
from recipes.sandbox import folders
from recipes.sandbox.kernel import SandboxReport
from recipes.sandbox.program import Limits, Outcome, Program, SandboxPolicy
from rollout.replica.python_child import child_command, child_environment

MOST_PROCESSES = 8
START_S = 120.0
MARGIN_S = 30.0
"""A supervisor that does not answer so long after its program's time is killed."""
CLOSE_S = 10.0
CLOSED = Outcome(failed="the sandbox was closed before it ended")
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")


class Sandbox:
    """Supervisors of programs, one a core, at most `MOST_PROCESSES`; each is started when needed.

    policy: "require" refuses a machine that cannot confine a program wholly. num_processes: None
    takes one a core.

    Raises InvalidRequest (`sandbox`), which names what the machine lacks.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        policy: SandboxPolicy = "require",
        num_processes: int | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise InvalidRequest("sandbox: programs are run on Linux only", field="sandbox")
        self._limits = limits or Limits()
        num = num_processes or min(os.cpu_count() or 1, MOST_PROCESSES)
        self._is_closed = False
        self._free: queue.SimpleQueue[_Supervisor] = queue.SimpleQueue()
        self._supervisors = [_Supervisor(self._limits) for _ in range(num)]
        self._threads = ThreadPoolExecutor(num, thread_name_prefix="sandbox")
        self.report = self._supervisors[0].start()
        if self.report.missing and policy == "require":
            self.close()
            raise InvalidRequest(
                f"sandbox: {self.report} cannot confine a program: it lacks "
                f"{' and '.join(self.report.missing)}; run on a kernel that has it, or give "
                "--sandbox best-effort to run what a model writes with less protection",
                field="sandbox",
            )
        for supervisor in self._supervisors:
            self._free.put(supervisor)

    async def run(self, program: Program) -> Outcome:
        """What became of a program, whose clock starts when it does. From any event loop."""
        return await asyncio.wrap_future(self.submit(program))

    def submit(self, program: Program) -> Future[Outcome]:
        """As `run`, for a caller without an event loop."""
        if not self._is_closed:
            return self._threads.submit(self._run, program)
        closed: Future[Outcome] = Future()
        closed.set_result(CLOSED)
        return closed

    def close(self) -> None:
        """End the processes; programs that run end too, and nothing is known of them. Idempotent;
        from any thread."""
        self._is_closed = True
        for supervisor in self._supervisors:
            supervisor.end()
        self._threads.shutdown()
        for supervisor in self._supervisors:
            supervisor.close()

    def _run(self, program: Program) -> Outcome:
        supervisor = self._free.get()
        try:
            outcome = CLOSED if self._is_closed else supervisor.run(program)
        finally:
            self._free.put(supervisor)
        return CLOSED if self._is_closed else outcome


class _Supervisor:
    """One process with at most one program."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._home = ""

    def start(self) -> SandboxReport:
        """Start the process and hear what confines programs in it.

        Raises InvalidRequest (`sandbox`) if it does not start."""
        self._process = subprocess.Popen(
            child_command(
                "recipes.sandbox.supervisor", json.dumps(dataclasses.asdict(self._limits))
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=_environment(),
            start_new_session=True,
        )
        hello = self._hear(START_S)
        if hello is None or hello["failed"]:
            why = "its process died" if hello is None else hello["failed"]
            self.close()
            raise InvalidRequest(f"sandbox: it does not start: {why}", field="sandbox")
        self._home = hello["home"]
        told = dict(hello["report"])
        return SandboxReport(**{**told, "leaks": tuple(told["leaks"])})

    def run(self, program: Program) -> Outcome:
        """Have a program run; `Outcome.failed` where the process is lost."""
        try:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self.start()
        except InvalidRequest as error:
            return Outcome(failed=error.message)
        assert self._process is not None and self._process.stdin is not None
        # Of a process that is gone or ended meanwhile, the end of its output says so.
        with contextlib.suppress(BrokenPipeError, ValueError):
            sink, has_asserts = self._process.stdin.fileno(), bool(program.asserts)
            told = {"code": program.code, "stdin": program.stdin, "has_asserts": has_asserts}
            write_frame(sink, told)
            if has_asserts:
                write_frame(sink, {"asserts": program.asserts})
        heard = self._hear(self._limits.wall_s + MARGIN_S)
        if heard is None:
            self.close()
            return Outcome(failed="the process that ran it died or did not answer")
        return Outcome(**{**heard, "passed": tuple(heard["passed"])})

    def end(self) -> None:
        """End the process, its program with it, while another thread may wait for that."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        # It ends its program and removes its folders.
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """As `end`, once nobody waits for it."""
        self.end()
        process, self._process = self._process, None
        if process is not None and process.stdout is not None:
            process.stdout.close()
        if os.path.isdir(self._home):
            folders.remove(self._home)

    def _hear(self, seconds: float) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return read_frame(self._process.stdout.fileno())


def _environment() -> dict[str, str]:
    """For a supervisor: nothing of the run's own, and the same hashes in every run."""
    found = child_environment()
    kept = {name: found[name] for name in KEPT_VARIABLES if name in found}
    return {
        **kept,
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
    }
