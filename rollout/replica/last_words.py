"""Why a process of the engine ended, read from the end of its log."""

from __future__ import annotations

import re
from pathlib import Path

_READ_BYTES = 65536
_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(: .*)?$")
_CRASH = re.compile(r"^(Fatal Python error|terminate called|Segmentation fault|MemoryError).*")
_LONGEST = 500


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
