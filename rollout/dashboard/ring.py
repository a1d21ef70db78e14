"""The last rows of several series, and the last events, each with a number that never changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Generic, TypeVar

from rollout.dashboard.figures import SeriesPage
from rollout.dashboard.numbers import gap

T = TypeVar("T")


class Ring(Generic[T]):
    """The last `size` of what was added, counted from the first on."""

    def __init__(self, size: int) -> None:
        self._kept: deque[T] = deque(maxlen=size)
        self.next = 0

    def add(self, value: T) -> None:
        """Add one at the end."""
        self._kept.append(value)
        self.next += 1

    def since(self, cursor: int, limit: int) -> tuple[int, list[T]]:
        """At most `limit` from number `cursor` on, or from the first that is kept; and the number
        of the first one."""
        oldest = self.next - len(self._kept)
        first = min(max(cursor, oldest), self.next)
        return first, list(islice(self._kept, first - oldest, first - oldest + limit))


class SeriesRing:
    """The last `size` rows of series. A row names the columns that it has values for."""

    def __init__(self, size: int) -> None:
        self._rows: Ring[tuple[float, Mapping[str, float | None]]] = Ring(size)

    def add(self, x: float, row: Mapping[str, float | None]) -> None:
        """Add a row at `x`, which is not before that of the last one."""
        self._rows.add((x, row))

    def page(self, since: int, limit: int) -> SeriesPage:
        """At most `limit` rows from number `since` on, as they travel."""
        first, rows = self._rows.since(since, limit)
        names = dict.fromkeys(name for _, row in rows for name in row)
        return SeriesPage(
            first=first,
            next=first + len(rows),
            x=[x for x, _ in rows],
            columns={name: [gap(row.get(name)) for _, row in rows] for name in names},
            more=first + len(rows) < self._rows.next,
        )
