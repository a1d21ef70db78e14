"""A process that does one job after the other, and is killed with the one that takes too long.

For what a request brings and this process cannot stop once it is at it: templates, grammars. The
process is started by the first job and serves the next; `job_loop` is its other side.

A job may use so much processor time, which the same job uses up on any machine, and has a multiple
of that to come to an end. One that does not was not found to be bad: it is late, by a typed error,
and may be tried again.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import weakref
from typing import IO, Any

from engine.errors import SlipstreamError
from rollout.replica.python_child import child_command, child_environment

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""What numpy starts on a machine of many cores would count as memory of the job."""

_START_S = 60.0
"""Longest until a process is ready: it imports, on a machine that may be busy."""

_PATIENCE = 12.0
"""Seconds that a second of processor time may take."""


class JobLate(SlipstreamError):
    """A job did not get the processor time that it may use: the machine is busy with other work."""

    status = 503


class JobProcess:
    """At most one process. Calls block and may come from any thread."""

    def __init__(
        self, module: str, *, limit_s: float, memory_bytes: int, greeting: bytes = b""
    ) -> None:
        """module: what is run, which calls `job_loop.serve_jobs`. limit_s: processor time
        of a job. memory_bytes: address space it may take beyond that of its start. greeting: what
        it is told when it starts."""
        self._module = module
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._greeting = greeting
        self._lock = threading.Lock()
        # Guards the two below: an interrupt must not meet the job after its own.
        self._state = threading.Lock()
        self._stop: threading.Event | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._remove: weakref.finalize[Any, Any] | None = None

    def run(self, data: bytes, stop: threading.Event | None = None) -> bytes | None:
        """The answer to `data`; None if the process ended in its place: the job took more processor
        time or memory than it may, or was interrupted. stop: what `interrupt` knows it by; a job
        whose `stop` is set is not begun. Raises JobLate for one that did not get that time."""
        stop = stop or threading.Event()
        with self._lock:
            with self._state:
                self._stop = stop
            try:
                process = self._started()
                if process is None:
                    return None
                limit_s = _PATIENCE * self._limit_s
                answer = None if stop.is_set() else _within(process, limit_s, data)
            except JobLate:
                self._close()
                raise
            finally:
                with self._state:
                    self._stop = None
            if answer is None:
                self._close()
            return answer

    def interrupt(self, stop: threading.Event | None = None) -> None:
        """End the job that has this `stop`, or whichever the process is at or is started for: at
        once if it has begun, before it begins otherwise."""
        with self._state:
            stop = stop or self._stop
            if stop is None:
                return
            stop.set()
            if stop is self._stop and self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process, and with it the job that it is at. Idempotent."""
        self.interrupt()
        with self._lock:
            self._close()

    def _started(self) -> subprocess.Popen[bytes] | None:
        """The process, ready; None if it ends before. Raises JobLate if it is not in time."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._close()
        arguments = str(self._memory_bytes), str(self._limit_s)
        self._process = subprocess.Popen(
            child_command(self._module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**child_environment(), **_ONE_THREAD},
            start_new_session=True,
        )
        self._remove = weakref.finalize(self, _end, self._process)
        if _within(self._process, _START_S, self._greeting) is None:
            self._close()
        return self._process

    def _close(self) -> None:
        if self._remove is not None:
            self._remove()
        self._process = self._remove = None


def _within(process: subprocess.Popen[bytes], limit_s: float, data: bytes) -> bytes | None:
    """The answer; None if the process ended. Raises JobLate, the process being killed, if it did
    neither for `limit_s`."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, give_up)
    timer.start()
    try:
        answer = _exchange(process, data)
    finally:
        timer.cancel()
    if answer is None and late.is_set() and process.wait() == -signal.SIGKILL:
        raise JobLate(
            f"work that was to be tried beforehand did not come to its end within {limit_s:g} s, "
            "since this machine is busy; send it again",
            field="server",
        )
    return answer


def _exchange(process: subprocess.Popen[bytes], data: bytes) -> bytes | None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
        size = process.stdout.read(8)
        if len(size) < 8:
            return None
        answer = process.stdout.read(int.from_bytes(size, "little"))
    except BrokenPipeError:
        return None
    return answer if len(answer) == int.from_bytes(size, "little") else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    pipes: list[IO[bytes] | None] = [process.stdin, process.stdout]
    for pipe in pipes:
        if pipe is not None:
            # What was still to be written is for nobody.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
