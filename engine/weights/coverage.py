"""Which elements of a tensor have come, where it comes in pieces."""

from __future__ import annotations

from bisect import bisect_left

from engine.errors import ManifestMismatch


class Coverage:
    """Disjoint ranges [start, stop) of the `size` elements of one flattened tensor."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._ranges: list[tuple[int, int]] = []

    @property
    def complete(self) -> bool:
        """Whether every element came."""
        return self.missing is None

    @property
    def missing(self) -> tuple[int, int] | None:
        """The first range that has not come."""
        if not self._ranges or self._ranges[0][0] > 0:
            return (0, self._ranges[0][0] if self._ranges else self._size)
        end = self._ranges[0][1]
        if end == self._size:
            return None
        return (end, self._ranges[1][0] if len(self._ranges) > 1 else self._size)

    def check(self, start: int, stop: int) -> None:
        """Raise ManifestMismatch, naming the tensor, for a range that is none or came before."""
        if not 0 <= start <= stop <= self._size:
            raise ManifestMismatch(
                f"{self._name} has no elements [{start}, {stop}): it has {self._size}",
                field=self._name,
            )
        at = bisect_left(self._ranges, (start, start))
        before, after = self._ranges[at - 1 : at], self._ranges[at : at + 1]
        overlaps = (before and before[0][1] > start) or (after and after[0][0] < stop)
        if overlaps and start < stop:
            raise ManifestMismatch(
                f"elements [{start}, {stop}) of {self._name} came twice", field=self._name
            )

    def add(self, start: int, stop: int) -> None:
        """Note that [start, stop) came; see `check` for what is raised."""
        self.check(start, stop)
        if start == stop:
            return
        at = bisect_left(self._ranges, (start, stop))
        if at < len(self._ranges) and self._ranges[at][0] == stop:
            stop = self._ranges.pop(at)[1]
        if at > 0 and self._ranges[at - 1][1] == start:
            start = self._ranges.pop(at - 1)[0]
            at -= 1
        self._ranges.insert(at, (start, stop))
