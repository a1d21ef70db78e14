"""The folder of a program: how much is in it, and its removal, whatever the program made there."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterator

BLOCK_BYTES = 512


def usage(folder: str, most_entries: int) -> tuple[int, int]:
    """Bytes on disk and number of entries; the walk ends beyond `most_entries`."""
    num_bytes = num_entries = 0
    for status in _statuses(folder):
        num_bytes += status.st_blocks * BLOCK_BYTES
        num_entries += 1
        if num_entries > most_entries:
            break
    return num_bytes, num_entries


def _statuses(folder: str) -> Iterator[os.stat_result]:
    waiting = [folder]
    while waiting:
        # What the program removes meanwhile, or made unreadable, is not counted.
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(entry.path)
                yield status


def remove(folder: str) -> None:
    """Remove a folder in which nobody writes any more.

    No path grows: a folder inside is moved beside it first, under its name and a number, however
    deep they are nested. Links are removed, never followed.
    """
    names = (f"{folder}.{number}" for number in itertools.count())
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        os.chmod(current, stat.S_IRWXU)
        with os.scandir(current) as entries:
            found = [(e.path, e.is_dir(follow_symlinks=False)) for e in entries]
        for path, is_folder in found:
            if not is_folder:
                os.unlink(path)
                continue
            os.chmod(path, stat.S_IRWXU)
            moved = next(names)
            os.rename(path, moved)
            waiting.append(moved)
        os.rmdir(current)
