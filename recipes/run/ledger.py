"""Where the time goes: every second between two readings belongs to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OTHER = "other"


class Ledger:
    """A stopwatch with phases. Time outside any phase is "other", so readings add up.

    Phases may nest: the inner one takes its time from the outer one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._current = OTHER
        self._spent: dict[str, float] = {}
        self.total = 0.0
        """Seconds handed out by `take` so far."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside the block to `name`."""
        outer = self._current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; their sum is the wall time in between."""
        self._switch(self._current)
        spent, self._spent = self._spent, {}
        self.total += sum(spent.values())
        return spent

    def _switch(self, name: str) -> None:
        now = self._clock()
        self._spent[self._current] = self._spent.get(self._current, 0.0) + now - self._since
        self._since = now
        self._current = name
