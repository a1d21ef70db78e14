"""A process that grades replies: whatever a grader does stays in here.

Started by `graders.GraderPool` alone. It loads the grader once and forks a child, which grades one
reply after the other. The kernel ends the child when a reply has taken its time (of the processor,
by the profiling timer, or of the clock, by the alarm): also inside C code, where Python would not
see a signal. The next child costs a fork, not another import.

A frame is its length in 4 bytes, little-endian, and JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_REASON = 300
"""Characters of a reason, so that a frame is written to a pipe at once or not at all."""

_REASONS = {
    signal.SIGPROF: "took more than {limit_s:g} s of processor time",
    signal.SIGALRM: "took more than {wall_s:g} s",
    signal.SIGKILL: "was killed, for its memory perhaps",
}


@dataclass(frozen=True, kw_only=True)
class GraderLimits:
    """Of one reply: limit_s of processor time, wall_s of the clock; memory_bytes of the process."""

    limit_s: float
    wall_s: float
    memory_bytes: int


def main(name: str, sample: list[str], limits: GraderLimits) -> None:
    """Say that the grader is there, or why not; then grade until the input ends."""
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    # A grader that prints or reads must not meet the frames.
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    try:
        grader = load(name)
        grader(*sample)
    except Exception as error:  # whatever a grader raises is told to the run
        write_frame(sink, {"id": 0, "broken": f"{type(error).__name__}: {error}"[:MAX_REASON]})
        return
    write_frame(sink, {"id": 0})
    current = mmap.mmap(-1, 8)
    while True:
        child = os.fork()
        if child == 0:
            _serve(grader, limits, source, sink, current)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return
        job = int.from_bytes(current[:8], "little")
        write_frame(sink, {"id": job, "failed": _reason(os.waitstatus_to_exitcode(status), limits)})


def load(name: str) -> Callable[..., float]:
    """The function called `module:function`."""
    module, _, function = name.partition(":")
    found: Callable[..., float] = getattr(importlib.import_module(module), function)
    return found


def _serve(
    grader: Callable[..., float], limits: GraderLimits, source: int, sink: int, current: mmap.mmap
) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    while (job := read_frame(source)) is not None:
        current[:8] = int(job["id"]).to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, limits.limit_s)
        signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
        answer = _grade(grader, job["arguments"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        current[:8] = bytes(8)
        write_frame(sink, {"id": job["id"], **answer})


def _grade(grader: Callable[..., float], arguments: list[str]) -> dict[str, Any]:
    try:
        reward = float(grader(*arguments))
    except MemoryError:
        return {"failed": "took more memory than it may"}
    except Exception as error:  # whatever a grader raises is told to the run
        return {"failed": f"raised {type(error).__name__}: {error}"[:MAX_REASON]}
    if not math.isfinite(reward):
        return {"failed": f"gave {reward}"}
    return {"reward": reward}


def _reason(exit_code: int, limits: GraderLimits) -> str:
    if exit_code > 0:
        return f"ended its process with exit code {exit_code}"
    try:
        ended_by = signal.Signals(-exit_code)
    except ValueError:
        return f"died of signal {-exit_code}"
    told = _REASONS.get(ended_by, f"died of {ended_by.name}")
    return told.format(limit_s=limits.limit_s, wall_s=limits.wall_s)


def write_frame(sink: int, value: dict[str, Any]) -> None:
    """Write one frame to a file descriptor. Raises BrokenPipeError if the reader is gone."""
    data = json.dumps(value).encode()
    rest = memoryview(len(data).to_bytes(4, "little") + data)
    while rest:
        rest = rest[os.write(sink, rest) :]


def read_frame(source: int) -> dict[str, Any] | None:
    """The next frame of a file descriptor; None at its end."""
    head = _read(source, 4)
    data = None if head is None else _read(source, int.from_bytes(head, "little"))
    if data is None:
        return None
    found: dict[str, Any] = json.loads(data)
    return found


def _read(source: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(source, size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    main(settings["grader"], settings["sample"], GraderLimits(**settings["limits"]))
