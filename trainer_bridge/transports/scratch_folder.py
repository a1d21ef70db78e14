"""A trainer's own folder below one that trainers share: gone with its trainer, however that ended.

Whoever has one holds a lock on it (flock), which the system lets go of when the process dies, by a
kill too. The next trainer that comes removes the folders whose locks nobody holds. Where the file
system has no locks, nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path

_NAME = re.compile(r"weights-[0-9a-f]{32}")


class ScratchFolder:
    """A new folder below `parent`, removed by `close`.

    path: where. Raises OSError when it cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        while True:
            self.path = parent / f"weights-{uuid.uuid4().hex}"
            self.path.mkdir()
            lock = _lock(self.path)
            # Another trainer may have taken it for abandoned before the lock was held.
            if lock is not None and (lock < 0 or self.path.is_dir()):
                break
        self._lock = lock

    def close(self) -> None:
        """Remove the folder. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove_abandoned(parent: Path) -> None:
    for path in parent.iterdir():
        if not _NAME.fullmatch(path.name) or path.is_symlink():
            continue
        lock = _lock(path)
        if lock is not None and lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None if somebody else does, or if the folder
    is gone; -1 where there are no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor
