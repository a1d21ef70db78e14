"""Files that may not fit on the disk: look before a large one, and say what is missing.

Disks fill under whoever writes: Python, torch's archive writer (C++) and safetensors (Rust), each
of which reports it in a way of its own. Here they become `DiskFull`, with the path and the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType

from engine.errors import DiskFull

_REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SIGNS = re.compile(
    r"os error (?:" + "|".join(str(number) for number in sorted(_REFUSED)) + r")\b"
    r"|No space left on device|Disk quota exceeded|File too large"
    r"|PytorchStreamWriter failed writing|unexpected pos \d+ vs"
)
"""What is said of a full disk by writers that raise no OSError."""


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is, or will be."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def require_room(path: Path, num_bytes: int) -> None:
    """Call before a large file or folder is written. num_bytes: an estimate of its size.

    Raises DiskFull where fewer are free.
    """
    free = free_bytes(path)
    if free < num_bytes:
        raise DiskFull(
            f"no room for {path}: it takes about {num_bytes:,} bytes, and {free:,} are free there",
            field=str(path),
        )


class writing:
    """Around code that writes `path`: a disk that refuses becomes DiskFull.

    undo: removes what was half written; called for whatever ended the block early.
    num_bytes: an estimate of what is written, where there is one.
    """

    def __init__(
        self, path: Path, *, undo: Callable[[], None] | None = None, num_bytes: int | None = None
    ) -> None:
        self._path = path
        self._undo = undo
        self._num_bytes = num_bytes

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        told = disk_refusal(error)
        free = free_bytes(self._path)
        if self._undo is not None:
            with contextlib.suppress(OSError):
                self._undo()
        if told is not None:
            wanted = "" if self._num_bytes is None else f"about {self._num_bytes:,} bytes, "
            raise DiskFull(
                f"could not write {self._path} ({wanted}{free:,} bytes are free there): {told}; "
                "what was half written is removed",
                field=str(self._path),
            ) from error


def disk_refusal(error: BaseException) -> str | None:
    """What the disk said, if a disk that is full, a quota or a limit on files is behind `error`:
    it, or one that it was raised from or while handling. None for every other error."""
    seen: set[int] = set()
    current: BaseException | None = error
    told = None
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _REFUSED:
            return os.strerror(current.errno)
        if told is None and _SIGNS.search(str(current)):
            told = "the writer stopped in the middle of the file"
        current = current.__cause__ or current.__context__
    return told


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: the old one stays until the new one is there.

    Raises DiskFull.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with writing(path, undo=temporary.unlink):
        temporary.write_bytes(data)
        os.replace(temporary, path)


def sync(path: Path) -> None:
    """Have what a file or folder holds on the disk itself, so that a loss of power leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_bytes(path: Path, data: bytes) -> None:
    """Add to the end of a file, all of it or nothing. Raises DiskFull."""
    with FileIO(path, "a") as file:
        write_all(file, data)


def write_all(file: FileIO, data: bytes) -> None:
    """Write at the end of an open file; what went there of `data` is taken back if not all of it
    does, where the file can be cut. Raises DiskFull."""
    before = os.fstat(file.fileno()).st_size
    rest = memoryview(data)
    with writing(Path(file.name), undo=lambda: _cut(file, before)):
        while rest:
            rest = rest[file.write(rest) :]


def _cut(file: FileIO, size: int) -> None:
    file.truncate(size)
