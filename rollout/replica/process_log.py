"""The log of a spawned process: its stderr, kept below a size, and why the process ended."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from pathlib import Path

_MAX_BYTES = 16 << 20
_KEPT_BYTES = 1 << 20
_READ_BYTES = 65536
_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(: .*)?$")
_CRASH = re.compile(r"^(Fatal Python error|terminate called|Segmentation fault|MemoryError).*")
_LONGEST = 500


class BoundedStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes records to stderr and cuts the file behind it to its end, `kept_bytes`, whenever
    it has grown past `max_bytes`.

    The file must be open for reading and appending, as whoever spawns the process opens it;
    anything else than a file is left alone. What others write to stderr is kept, and cut, alike.
    """

    def __init__(self, *, max_bytes: int = _MAX_BYTES, kept_bytes: int = _KEPT_BYTES) -> None:
        super().__init__(sys.stderr)
        self._max_bytes = max_bytes
        self._kept_bytes = kept_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        super().emit(record)
        self.flush()
        try:
            self._cut(sys.stderr.fileno())
        except (OSError, ValueError):
            # A stream without a descriptor, or one that cannot be read again.
            return

    def _cut(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size <= self._max_bytes:
            return
        kept = os.pread(descriptor, self._kept_bytes, status.st_size - self._kept_bytes)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"(what came before was cut)\n" + kept)


def log_to_stderr(name: str) -> None:
    """Log what matters of this process to its stderr; `name` stands in every line."""
    handler = BoundedStderr()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_tail(path: Path) -> str:
    """The last 64 KiB of a log; empty if it was never written or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _READ_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def cause_of_death(log: str) -> str:
    """The error that ended the process: the last line of the last traceback, else the line of a
    crash of the interpreter, else "". One line, at most 500 characters."""
    lines = log.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        if _CRASH.match(lines[number]):
            return lines[number][:_LONGEST]
        if lines[number].strip() == _TRACEBACK:
            return _raised(lines[number + 1 :])
    return ""


def _raised(lines: list[str]) -> str:
    """The first line after the frames of a traceback, which are indented."""
    for line in lines:
        if _RAISED.match(line):
            return line[:_LONGEST]
    return ""
