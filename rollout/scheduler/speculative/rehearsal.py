"""While one draft length is in use, the others are measured again now and then."""

from __future__ import annotations

from collections.abc import Iterable

from rollout.scheduler.speculative.ladder import row_bucket

_PLAIN_EVERY = 256
_PLAIN_WHEN_SURPRISED = 16
_OTHERS_FIRST = 64
_OTHERS_EVERY = 1024
_NUM_STEPS = 2
_NUM_FIRST = 3
"""The first step of a kind is not measured."""


class Rehearsals:
    """Which kind of step, bucket of rows and draft length, is due to be measured again.

    A plain one: two steps of 256 in each bucket, three where none was, and more where costs change.
    Others, whatever their bucket since each may capture a graph: after 64 steps, then after twice
    as many, up to two of 1024.
    """

    def __init__(self) -> None:
        self._now = 0
        self._last: dict[tuple[int, int], int] = {}
        self._last_of: dict[int, int] = {}
        self._wait: dict[int, int] = {}
        self._kind = (0, 0)
        self._left = 0

    def planned(self, num_rows: int, k: int) -> None:
        """A step of `k` drafts was planned: not always what was asked for."""
        self._now += 1
        kind = (row_bucket(num_rows), k)
        self._last[kind] = self._last_of[k] = self._now
        if self._left and kind[0] == self._kind[0]:
            self._left -= 1

    def running(self, num_rows: int, k: int) -> bool:
        """Whether steps of `k` drafts are being measured again."""
        return self._left > 0 and self._kind == (row_bucket(num_rows), k)

    def due(self, num_rows: int, k: int, *, surprised: bool = False) -> bool:
        """Whether they should be. surprised: costs changed, so plain ones did perhaps, too."""
        if k:
            wait = self._wait.get(k, _OTHERS_FIRST)
            return self._now - self._last_of.get(k, 0) >= wait
        last = self._last.get((row_bucket(num_rows), 0))
        every = _PLAIN_WHEN_SURPRISED if surprised else _PLAIN_EVERY
        return last is None or self._now - last >= every

    def oldest(self, options: Iterable[int]) -> int:
        """The one of these draft lengths that no step had for longest."""
        return min(options, key=lambda k: self._last_of.get(k, 0))

    def start(self, num_rows: int, k: int) -> None:
        """The next two or three steps have `k` drafts."""
        self._kind = (row_bucket(num_rows), k)
        self._wait[k] = min(2 * self._wait.get(k, _OTHERS_FIRST), _OTHERS_EVERY)
        self._left = _NUM_STEPS if self._kind in self._last else _NUM_FIRST
