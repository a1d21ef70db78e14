"""Where texts of finished sequences lie in the history, and which of them are overwritten."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Segment `number` takes the places [at, at + size). key: of the prompt it was sampled for;
    version: of the weights."""

    number: int
    at: int
    size: int
    key: bytes
    version: int


class SegmentRing:
    """Places that are given out in turn, the oldest segments being overwritten.

    num_places: tokens the history holds. num_segments: most there are at once; a number is free
    again once its segment is dropped.
    """

    def __init__(self, num_places: int, num_segments: int) -> None:
        self._num_places = num_places
        self._live: dict[int, Segment] = {}
        """By number, oldest first."""
        self._free = deque(range(num_segments))
        self._next = 0

    def __getitem__(self, number: int) -> Segment:
        return self._live[number]

    @property
    def longest(self) -> int:
        """Tokens that a segment may have: one does not displace all others."""
        return max(1, self._num_places // 4)

    def add(self, size: int, key: bytes, version: int) -> tuple[Segment, list[Segment]]:
        """A new segment of `size` tokens, at most `longest`; and those dropped to make room."""
        assert 0 < size <= self.longest, f"a segment of {size} tokens"
        dropped = []
        if self._next + size > self._num_places:
            dropped += self._drop_over(self._next, self._num_places)
            self._next = 0
        dropped += self._drop_over(self._next, self._next + size)
        if not self._free:
            dropped.append(self._oldest())
            self.drop(dropped[-1])
        segment = Segment(self._free.popleft(), self._next, size, key, version)
        self._live[segment.number] = segment
        self._next += size
        return segment, dropped

    def drop(self, segment: Segment) -> None:
        """Give up a segment."""
        del self._live[segment.number]
        self._free.append(segment.number)

    def not_of(self, versions: frozenset[int]) -> list[Segment]:
        """The segments of other versions than these."""
        return [segment for segment in self._live.values() if segment.version not in versions]

    def _drop_over(self, start: int, stop: int) -> list[Segment]:
        """Drop what lies in the next places, [start, stop): the oldest segments, since those that
        are left lie in the order of their places, going round from here."""
        dropped = []
        while self._live:
            oldest = self._oldest()
            if oldest.at >= stop or oldest.at + oldest.size <= start:
                break
            self.drop(oldest)
            dropped.append(oldest)
        return dropped

    def _oldest(self) -> Segment:
        return next(iter(self._live.values()))
