"""A process that grades replies: whatever a grader does stays in here.

Started by `pool.GraderPool` alone. It loads the grader once and forks a child, which grades one
reply after the other. The child ends when a reply has taken its time: of the processor, by the
kernel's profiling timer, also inside C code, where Python would not see a signal; of the clock, by
this process, whatever the grader does with timers and signals. The next child costs a fork, not
another import. Before it starts, all that the one before has started is ended and reaped.
"""

from __future__ import annotations

import inspect
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.rewards.base import Failed
from recipes.rewards.graders import descendants
from recipes.rewards.graders.frames import read_frame, write_frame
from recipes.rewards.graders.grader_call import call, limit_memory, load, told

JOB = struct.Struct("<qdd")
"""What the child is at: the number of a reply, when it began, its seconds of processor time."""
NO_JOB = bytes(JOB.size)
"""Stands there between two replies."""
FORK_AGAIN = 93
"""Exit code of a child, between two replies, that leaves something running."""
LATE = 256
"""Stands for the exit code of a child that was killed because its reply was late."""
_TOLD = frozenset({signal.SIGCHLD, signal.SIGTERM})


@dataclass(frozen=True, kw_only=True)
class GraderLimits:
    """Of one reply: cpu_s of processor time, None without a limit; wall_s of the clock;
    memory_bytes beyond what the process has when the grader is loaded."""

    cpu_s: float | None
    wall_s: float
    memory_bytes: int


def main(function: str, sample: list[Any] | None, limits: GraderLimits) -> None:
    """Say that the grader is there, or why not; then grade until the input ends.

    function: "module:function" or "FILE.py:function". sample: see `worker.GraderSpec`.
    """
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    # A grader that prints or reads must not meet the frames.
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    try:
        grader = load(function)
        if sample is not None:
            grader(*sample)
        parameters = _parameters(grader)
    except BaseException as error:  # whatever a grader raises is told to the run
        write_frame(sink, {"id": 0, "broken": told(error)})
        return
    write_frame(sink, {"id": 0, **parameters})
    descendants.adopt()
    signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD)
    current = mmap.mmap(-1, len(NO_JOB))
    while True:
        current[:] = NO_JOB
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TOLD)
            _serve(grader, limits, source, sink, current)
            os._exit(0)
        exit_code = _watch(child, limits, current)
        descendants.end_all()
        job, _, cpu_s = JOB.unpack(current)
        if exit_code is None or (not job and exit_code != FORK_AGAIN):
            return
        if job:
            failed = _failure(exit_code, limits.wall_s, cpu_s)
            write_frame(sink, {"id": job, "kind": failed.kind, "reason": failed.reason})


def _parameters(grader: Callable[..., Any]) -> dict[str, Any]:
    """Names of its parameters: those without a default, all, and whether it takes any."""
    try:
        found = inspect.signature(grader).parameters.values()
    except ValueError:  # some functions of C modules have none
        return {"required": [], "known": [], "takes_any": True}
    kinds = inspect.Parameter
    known = [p for p in found if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    return {
        "required": [p.name for p in known if p.default is kinds.empty],
        "known": [p.name for p in known],
        "takes_any": any(p.kind is kinds.VAR_KEYWORD for p in found),
    }


def _serve(
    grader: Callable[..., Any], limits: GraderLimits, source: int, sink: int, current: mmap.mmap
) -> None:
    descendants.end_with_parent()
    limit_memory(limits.memory_bytes)
    own = os.getpid()
    while (job := read_frame(source)) is not None:
        current[:] = JOB.pack(job["id"], time.monotonic(), job["cpu_s"] or 0.0)
        answer = call(grader, job)
        if os.getpid() != own:
            os._exit(0)  # a grader that forked, and returned twice
        write_frame(sink, {"id": job["id"], **answer})
        current[:] = NO_JOB
        if threading.active_count() > 1 or descendants.any_left():
            os._exit(FORK_AGAIN)


def _watch(child: int, limits: GraderLimits, current: mmap.mmap) -> int | None:
    """Wait for the end of the child, which is killed when its reply is late. Its exit code, LATE
    for one that was killed; None if this process is told to end."""
    while (exit_code := _ended(child)) is None:
        left_s = _left_s(limits, current)
        if left_s <= 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return LATE
        found = signal.sigtimedwait(_TOLD, left_s)
        if found is not None and found.si_signo == signal.SIGTERM:
            return None
    return exit_code


def _ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _left_s(limits: GraderLimits, current: mmap.mmap) -> float:
    """Seconds that the reply under way has left. Between replies, the time after which to look
    again: none is late before."""
    job, started, _ = JOB.unpack(current)
    return limits.wall_s - (time.monotonic() - started if job else 0.0)


def _failure(exit_code: int, wall_s: float, cpu_s: float) -> Failed:
    """What a reply that ended its process is told."""
    if exit_code == LATE:
        return Failed(kind="timeout", reason=f"took more than {wall_s:g} s")
    if exit_code >= 0:
        return Failed(kind="died", reason=f"ended its process with exit code {exit_code}")
    if -exit_code == signal.SIGPROF:
        return Failed(kind="timeout", reason=f"took more than {cpu_s:g} s of processor time")
    if -exit_code == signal.SIGKILL:
        return Failed(kind="died", reason="was killed, for its memory perhaps")
    names = {number.value: number.name for number in signal.Signals}
    return Failed(kind="died", reason=f"died of {names.get(-exit_code, f'signal {-exit_code}')}")


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    main(settings["function"], settings["sample"], GraderLimits(**settings["limits"]))
