"""Graders that run beside the run: in processes of their own, several replies at once.

Computer algebra on what a model wrote may take forever, fill the memory or crash. Here a reply that
cannot be graded in its time has reward 0 and is reported, and costs no other reply anything. The
limit is one of processor time, so that a busy machine changes no reward; rewards come in the order
asked and do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from recipes.rewards.grader_main import GraderLimits, read_frame, write_frame
from rollout.replica.python_child import child_command, child_environment

LIMITS = GraderLimits(limit_s=1.0, wall_s=30.0, memory_bytes=4 << 30)
START_S = 300.0
"""Time for a grader to be imported."""
MARGIN_S = 30.0
"""A process that does not answer so long after its alarm is killed from here."""
MOST_PROCESSES = 8


@dataclass(frozen=True, kw_only=True)
class GraderSpec:
    """A grader that a task names. function: "module:function" of texts, which gives a number.
    sample: arguments of a first call, which imports and builds whatever the function needs."""

    function: str
    sample: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What became of one reply. failed: why it could not be graded, and has reward 0; else ""."""

    reward: float
    failed: str = ""


class GraderPool:
    """Processes of one grader, started by the first call of `grade`.

    num_processes: None takes one a core, at most `MOST_PROCESSES`.
    """

    def __init__(
        self, spec: GraderSpec, *, num_processes: int | None = None, limits: GraderLimits = LIMITS
    ) -> None:
        self._spec = spec
        self._limits = limits
        self._num_processes = num_processes or min(os.cpu_count() or 1, MOST_PROCESSES)
        self._workers: list[_Worker] = []

    def grade(self, arguments: Sequence[tuple[str, ...]]) -> list[Grade]:
        """One grade for each tuple of arguments, in order; equal ones are graded once.

        Raises InvalidRequest if the grader cannot be loaded.
        """
        different = list(dict.fromkeys(arguments))
        wanted = min(self._num_processes, len(different))
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._spec, self._limits))
        for worker in self._workers[:wanted]:
            worker.launch()
        grades = _run(self._workers[:wanted], different)
        return [grades[each] for each in arguments]

    def close(self) -> None:
        """End the processes. Idempotent."""
        for worker in self._workers:
            worker.close()
        self._workers = []


def _run(
    workers: list[_Worker], arguments: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], Grade]:
    waiting = deque(arguments)
    grades: dict[tuple[str, ...], Grade] = {}
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            worker.begin(waiting, selector)
        while selector.get_map():
            now = time.monotonic()
            until = min(key.data.deadline for key in selector.get_map().values())
            for key, _ in selector.select(max(until - now, 0.0)):
                key.data.answer(grades)
            watched = list(selector.get_map().values())
            for key in watched:
                key.data.give_up_if_late(grades)
            free = [key for key in watched if key.data.job is None]
            # All first: a process that is started may get the number of a pipe that was closed.
            for key in free:
                selector.unregister(key.fd)
            for key in free:
                key.data.begin(waiting, selector)
    return grades


class _Worker:
    """One process, with at most one job. job: its arguments; deadline: when it is given up."""

    def __init__(self, spec: GraderSpec, limits: GraderLimits) -> None:
        self._spec = spec
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._number = 0
        self.job: tuple[str, ...] | None = None
        self.deadline = 0.0

    def launch(self) -> None:
        """Start the process, if there is none, without waiting for it."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process, self._is_ready = _start(self._spec, self._limits), False

    def begin(self, waiting: deque[tuple[str, ...]], selector: selectors.BaseSelector) -> None:
        """Take the next job, if there is one, and be watched by the selector."""
        if not waiting:
            return
        self.job = waiting.popleft()
        self._send(self._started())
        process = self._process
        assert process is not None and process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ, self)

    def answer(self, grades: dict[tuple[str, ...], Grade]) -> None:
        """Take what the process says; one that says nothing more is replaced."""
        assert self._process is not None and self._process.stdout is not None
        assert self.job is not None
        found = read_frame(self._process.stdout.fileno())
        if found is None:
            self._fail(grades, "the process that graded it died")
        elif found["id"] == self._number:
            grades[self.job] = Grade(
                reward=found.get("reward", 0.0), failed=found.get("failed", "")
            )
            self.job = None

    def give_up_if_late(self, grades: dict[tuple[str, ...], Grade]) -> None:
        """Kill a process that its own alarms did not end."""
        if self.job is not None and time.monotonic() >= self.deadline:
            self._fail(grades, f"did not end in {self._limits.wall_s + MARGIN_S:g} s")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            # It leads a session: a child that hangs goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _fail(self, grades: dict[tuple[str, ...], Grade], reason: str) -> None:
        assert self.job is not None
        grades[self.job] = Grade(reward=0.0, failed=reason)
        self.job = None
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        self.launch()
        process = self._process
        assert process is not None
        if not self._is_ready:
            told = _first_words(process)
            if told:
                self.close()
                raise InvalidRequest(
                    f"task: the grader {self._spec.function} does not work: {told}", field="task"
                )
            self._is_ready = True
        return process

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and self.job is not None
        self._number += 1
        self.deadline = time.monotonic() + self._limits.wall_s + MARGIN_S
        # Of a process that is gone, the end of its output says so.
        with contextlib.suppress(BrokenPipeError):
            write_frame(process.stdin.fileno(), {"id": self._number, "arguments": self.job})


def _start(spec: GraderSpec, limits: GraderLimits) -> subprocess.Popen[bytes]:
    settings: dict[str, Any] = {
        "grader": spec.function,
        "sample": spec.sample,
        "limits": dataclasses.asdict(limits),
    }
    return subprocess.Popen(
        child_command("recipes.rewards.grader_main", json.dumps(settings)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=child_environment(),
        start_new_session=True,
    )


def _first_words(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process that was started; why it will not grade, or ""."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_S):
            return f"it was not there after {START_S:g} s"
    found = read_frame(process.stdout.fileno())
    if found is None:
        return "its process died"
    told: str = found.get("broken", "")
    return told
