"""Bytes of POSIX shared memory of a trainer, copied into memory of this process.

Not mapped: a block that its owner cuts short would end whoever reads the pages that are gone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.errors import InvalidRequest, WeightUpdateError
from engine.protocol import IpcBuffer

_SHARED_MEMORY = Path("/dev/shm")


def read(buffer: IpcBuffer, offset: int, size: int) -> torch.Tensor:
    """Bytes [offset, offset + size) of a block: uint8 [size] of this process.

    Raises InvalidRequest for a name of no block, WeightUpdateError for one that is not there or
    shorter than that; no memory was taken for one that is too short to begin with.
    """
    with _opened(buffer, offset + size) as file:
        return _read(file, buffer, offset, size)


def require(buffer: IpcBuffer) -> None:
    """Raise what `read` would raise for a block that is not there or not of its size."""
    with _opened(buffer, buffer.size):
        pass


@contextmanager
def _opened(buffer: IpcBuffer, end: int) -> Iterator[int]:
    """A descriptor of a block that has `end` bytes at least."""
    path = _SHARED_MEMORY / buffer.name.lstrip("/")
    if "\0" in buffer.name or path.parent != _SHARED_MEMORY or buffer.size < 1:
        raise InvalidRequest(f"{buffer.name!r} names no shared memory", field="payloads")
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(buffer, str(error)) from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(f"{buffer.name!r} names no shared memory", field="payloads")
        if found.st_size < max(buffer.size, end):
            raise _unreadable(buffer, f"it has {found.st_size} bytes")
        yield file
    finally:
        os.close(file)


def _read(file: int, buffer: IpcBuffer, offset: int, size: int) -> torch.Tensor:
    held = torch.empty(size, dtype=torch.uint8)
    view = memoryview(held.numpy())  # type: ignore[arg-type]
    done = 0
    while done < size:
        try:
            count = os.preadv(file, [view[done:]], offset + done)
        except OSError as error:
            raise _unreadable(buffer, str(error)) from error
        if count == 0:
            raise _unreadable(buffer, f"it ends at byte {offset + done}")
        done += count
    return held


def _unreadable(buffer: IpcBuffer, why: str) -> WeightUpdateError:
    return WeightUpdateError(
        f"shared memory {buffer.name!r} of {buffer.size} bytes cannot be read ({why}): is the "
        "sender alive, on this host?",
        field="payloads",
    )
