"""The processes that a process has started, and those that these have: ended, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""linux/prctl.h"""


def adopt() -> None:
    """From now on, a descendant whose parent ends becomes a child of this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_all() -> None:
    """Kill and reap all descendants, in sessions of their own too. Needs `adopt` before they were
    started; those that this user may not kill stay."""
    spared: set[int] = set()
    while children := _children_of(os.getpid()) - spared:
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except PermissionError:
                spared.add(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG if pid in spared else 0)


def any_left() -> bool:
    """Whether this process, or its parent beside it, has a child that runs; ended ones are
    reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return len(_listed(os.getppid())) > 1
    return True


def _listed(pid: int) -> list[str]:
    """Children by the kernel's list; none where it keeps no such list."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return []


def _children_of(pid: int) -> set[int]:
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _parent_of(entry) == pid:
            found.add(int(entry))
    return found


def _parent_of(pid: str) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold brackets and spaces itself; state and parent follow it.
    return int(stat.rpartition(")")[2].split()[1])
