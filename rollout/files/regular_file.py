"""Files in folders that a client names: regular ones, read and written without surprises.

A pipe blocks whoever opens it, a device never ends, and a link leads elsewhere. What is read may
be a link, as in a hub's cache, whose end is a regular file; what is written never follows one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.errors import CheckpointError

Look = Callable[[], None]
"""Called between blocks; what it raises ends the work."""

_BLOCK = 16 << 20
_LARGEST_SMALL = 256 << 20


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The regular file at `path`. Raises CheckpointError for anything else, at once, and OSError
    (FileNotFoundError) as `open` does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _require_regular(descriptor, path)
        yield file


def read_small(path: Path) -> bytes:
    """Contents of a small file. Raises as `reading` does, and CheckpointError for a large one."""
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_SMALL:
            raise CheckpointError(f"{path} has {size} bytes, which is absurd", field=path.name)
        return file.read(size)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file at `path` in place of whatever is there, on the disk at the end."""
    path.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def touched(path: Path) -> int:
    """A descriptor of the regular file at `path`, made if nothing is there; the caller closes
    it. Raises CheckpointError or OSError for anything else, links too."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        _require_regular(descriptor, path)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def copy(path: Path, target: BinaryIO, look: Look) -> None:
    """Write the contents of the file at `path` to `target`. Raises CheckpointError for a file
    that grows or shrinks meanwhile."""
    with reading(path) as file:
        left = os.fstat(file.fileno()).st_size
        while left and (block := file.read(min(left, _BLOCK))):
            look()
            target.write(block)
            left -= len(block)
        if left or file.read(1):
            raise CheckpointError(f"{path} changed while it was copied", field=path.name)


def _require_regular(descriptor: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise CheckpointError(f"{path} is no regular file", field=path.name)
