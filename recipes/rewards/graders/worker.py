"""One process that grades, as the run holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from recipes.rewards.base import Failed, Grade
from recipes.rewards.graders.frames import read_frame, write_frame
from recipes.rewards.graders.grader_main import GraderLimits
from rollout.replica.python_child import child_command, child_environment

START_S = 300.0
"""Time for a grader to be imported."""
MARGIN_S = 30.0
"""A process that says nothing so long after a reply's time is killed from here."""
END_S = 5.0
"""Time for a process to end what it has started."""


@dataclass(frozen=True, kw_only=True)
class GraderSpec:
    """A grader that a task or a user names.

    function: "module:function" or "FILE.py:function", which gives a number. sample: arguments of a
    first call, which imports and builds whatever the function needs; None makes none. field: the
    option that named it.
    """

    function: str
    sample: tuple[str, ...] | None = None
    field: str = "task"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Names of a grader's parameters. required: those without a default. takes_any: it has
    `**keywords`."""

    known: frozenset[str]
    required: frozenset[str]
    takes_any: bool


class Worker:
    """Starts its process when it is needed, and another one when that ended. One call at a time;
    any thread may call."""

    def __init__(self, spec: GraderSpec, limits: GraderLimits) -> None:
        self._spec = spec
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._parameters: Parameters | None = None
        self._number = 0
        self._ended = False
        self._busy = threading.Lock()

    def launch(self) -> None:
        """Start the process, if there is none, without waiting for it."""
        with self._busy:
            self._launched()

    def parameters(self) -> Parameters:
        """Those of the grader, once it is loaded. Raises InvalidRequest if it cannot be."""
        with self._busy:
            return self._ready(self._launched())

    def grade(self, job: dict[str, Any]) -> Grade:
        """The grade of one call; see `grader_call.call`. Raises InvalidRequest if the grader cannot
        be loaded."""
        with self._busy:
            if self._ended:
                return Failed(kind="died", reason="its process was ended with the run")
            process = self._launched()
            self._ready(process)
            self._number += 1
            assert process.stdin is not None
            # Of a process that is gone, the end of its output says so.
            with contextlib.suppress(BrokenPipeError):
                write_frame(process.stdin.fileno(), {"id": self._number, **job})
            return self._answer(process)

    def end(self) -> None:
        """Tell the process to end, also in the middle of a reply; `close` waits for it."""
        self._ended = True
        process = self._process
        if process is not None:
            process.terminate()

    def close(self) -> None:
        """End the process for good, with all that it has started. Idempotent."""
        self.end()
        with self._busy:
            self._close()

    def _answer(self, process: subprocess.Popen[bytes]) -> Grade:
        late_s = self._limits.wall_s + MARGIN_S
        deadline = time.monotonic() + late_s
        while _speaks(process, deadline):
            assert process.stdout is not None
            found = read_frame(process.stdout.fileno())
            if found is None:
                self._close()
                return Failed(kind="died", reason="the process that graded it died")
            if found["id"] == self._number:
                return _grade(found)
        self._close()
        return Failed(kind="timeout", reason=f"did not end in {late_s:g} s")

    def _launched(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._close()
            self._process = _start(self._spec, self._limits)
        return self._process

    def _ready(self, process: subprocess.Popen[bytes]) -> Parameters:
        if self._parameters is None:
            told = _first_words(process)
            if isinstance(told, str):
                self._close()
                raise InvalidRequest(
                    f"{self._spec.field}: the grader {self._spec.function} does not work: {told}",
                    field=self._spec.field,
                )
            self._parameters = told
        return self._parameters

    def _close(self) -> None:
        process, self._process, self._parameters = self._process, None, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        # It leads a session: what is left of it goes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _grade(frame: dict[str, Any]) -> Grade:
    if "reward" in frame:
        return float(frame["reward"])
    return Failed(kind=frame["kind"], reason=frame["reason"])


def _start(spec: GraderSpec, limits: GraderLimits) -> subprocess.Popen[bytes]:
    settings = {
        "function": spec.function,
        "sample": spec.sample,
        "limits": dataclasses.asdict(limits),
    }
    return subprocess.Popen(
        child_command("recipes.rewards.graders.grader_main", json.dumps(settings)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=child_environment(),
        start_new_session=True,
    )


def _first_words(process: subprocess.Popen[bytes]) -> Parameters | str:
    """Wait for a process that was started; what it takes, or why it will not grade."""
    if not _speaks(process, time.monotonic() + START_S):
        return f"it was not there after {START_S:g} s"
    assert process.stdout is not None
    found = read_frame(process.stdout.fileno())
    if found is None:
        return "its process died"
    if "broken" in found:
        return str(found["broken"])
    return Parameters(
        known=frozenset(found["known"]),
        required=frozenset(found["required"]),
        takes_any=found["takes_any"],
    )


def _speaks(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait until the process has said something, or has ended; false at the deadline."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return bool(selector.select(max(deadline - time.monotonic(), 0.0)))
