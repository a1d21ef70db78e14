"""New lines of a file that another process writes.

Only whole lines are read: the rest of one that is half written comes with the next look. A file
that was cut, or replaced by another of its name, begins anew; so does one whose bytes before the
place that was reached are others than they were.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidRequest

_BLOCK = 8 << 20
LONGEST_LINE = 64 << 20
"""A line of more bytes is passed over."""
_ANCHOR = 64
_PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLines:
    """What a look found. anew: the file is another than that of the look before, and these are its
    first lines. starts: where each line begins in the file. lines: without their ends. more: there
    are others, which the next look brings."""

    anew: bool
    more: bool
    starts: list[int]
    lines: list[bytes]


class LineTail:
    """Reads a file from its beginning, a look at a time. A file that is not there has no lines.

    Raises InvalidRequest (`run`) for what is no regular file, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._offset = 0
        self._anchor = b""
        self._seen: tuple[int, int] = (-1, -1)
        self._passing_over = False

    def look(self, most_bytes: int | None = None) -> NewLines:
        """The lines that became whole since the last look. most_bytes: leaves the others to the
        next look once there are so many."""
        anew = self._follow_replacement()
        starts: list[int] = []
        lines: list[bytes] = []
        begin, more = self._offset, False
        if self._descriptor is not None:
            while not more and (data := self._whole_lines()):
                self._split(data, starts, lines)
                self._offset += len(data)
                self._anchor = data[-_ANCHOR:]
                more = most_bytes is not None and self._offset - begin >= most_bytes
        return NewLines(anew=anew, more=more, starts=starts, lines=lines)

    def read_at(self, start: int) -> bytes | None:
        """The line that begins at `start`, of the file of the last look; None past its end."""
        if self._descriptor is None or start >= self._offset:
            return None
        data = bytearray()
        while len(data) <= LONGEST_LINE:
            more = os.pread(self._descriptor, _PIECE, start + len(data))
            if not more:
                return None
            piece, end, _ = more.partition(b"\n")
            data += piece
            if end:
                break
        return bytes(data)

    def restart(self) -> None:
        """Have the next look begin at the beginning."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        self._offset, self._anchor, self._seen = 0, b"", (-1, -1)
        self._passing_over = False

    close = restart

    def _follow_replacement(self) -> bool:
        """Open the file that is at the path now. Whether it is another than the one read so far."""
        had_read = self._offset > 0
        try:
            there = os.stat(self.path)
            if self._descriptor is not None and self._is_another(there):
                self.restart()
            if self._descriptor is None:
                self._descriptor = open_regular(self.path)
                return had_read
        except FileNotFoundError:
            self.restart()
            return had_read
        except OSError as error:
            raise InvalidRequest(
                f"run: cannot read {self.path}: {error.strerror}", field="run"
            ) from error
        return False

    def _is_another(self, there: os.stat_result) -> bool:
        assert self._descriptor is not None
        # The open one keeps its number: no other file can have it.
        if not os.path.samestat(there, os.fstat(self._descriptor)):
            return True
        now = (there.st_size, there.st_mtime_ns)
        if now == self._seen:
            return False
        self._seen = now
        if there.st_size < self._offset:
            return True
        start = self._offset - len(self._anchor)
        return os.pread(self._descriptor, len(self._anchor), start) != self._anchor

    def _whole_lines(self) -> bytes:
        """What is there behind the offset up to the last end of a line, some megabytes at most."""
        assert self._descriptor is not None
        data = os.pread(self._descriptor, _BLOCK, self._offset)
        while b"\n" not in data and len(data) < LONGEST_LINE:
            more = os.pread(self._descriptor, _BLOCK, self._offset + len(data))
            if not more:
                return b""
            data += more
        if b"\n" not in data:
            self._passing_over = True
            return data
        return data[: data.rindex(b"\n") + 1]

    def _split(self, data: bytes, starts: list[int], lines: list[bytes]) -> None:
        """Add the lines of `data`, which ends with one but where a line is passed over."""
        start = self._offset
        for line in data.split(b"\n")[:-1]:
            if self._passing_over:
                self._passing_over = False
            elif line.strip():
                starts.append(start)
                lines.append(line)
            start += len(line) + 1


def open_regular(path: Path) -> int:
    """A descriptor to read a file by. Raises InvalidRequest (`run`) for what is no regular file,
    which could keep its reader waiting for good, and OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequest(f"run: {path} is no regular file", field="run")
    return descriptor
