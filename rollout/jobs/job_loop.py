"""The process of `job_process.JobProcess`: a greeting, then jobs until its input ends.

Whatever a job does stays in here: memory has a limit, and a job that has used up its time is ended
by a timer of the kernel, also when nobody is left who could kill this process. The timer counts
processor time, so that what a job may do does not depend on what else the machine does.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

Answer = Callable[[bytes], bytes]


def serve_jobs(start: Callable[[bytes], Answer], argv: list[str]) -> None:
    """Answer jobs until there are no more. start: makes, of the greeting, what answers a job. argv:
    memory in bytes and time of a job in seconds, as `JobProcess` writes them."""
    most, limit_s = _used_bytes() + int(argv[0]), float(argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    greeting = _read(sys.stdin.buffer)
    if greeting is None:
        return
    answer = start(greeting)
    _write(b"")
    while (data := _read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        found = answer(data)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _write(found)


def _used_bytes() -> int:
    """Address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _read(source: BinaryIO) -> bytes | None:
    size = source.read(8)
    return source.read(int.from_bytes(size, "little")) if len(size) == 8 else None


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
    sys.stdout.buffer.flush()
