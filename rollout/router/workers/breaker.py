"""When a worker that fails is left alone, and how many tries a router spends on failures.

The breaker is that of Nygard, "Release It!" (2007): closed, open, and half-open for one try.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

FAILURES = 3
WITHIN_S = 10.0
REST_S = 2.0
MOST_REST_S = 30.0


class Breaker:
    """Counts the failures of one worker. clock: seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=FAILURES)
        self._open_until = 0.0
        self._rest_s = REST_S
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether the worker is to be left alone."""
        return self._open_until > 0.0 and (self._trying or self._clock() < self._open_until)

    @property
    def half_open(self) -> bool:
        """Whether one try may show if it is well again."""
        return self._open_until > 0.0 and not self._trying and self._clock() >= self._open_until

    def begin_try(self) -> None:
        """That try is on its way: nobody else tries."""
        self._trying = True

    def undecided(self) -> None:
        """That try has ended. If it showed nothing, since whoever asked has left, another may."""
        self._trying = False

    def succeeded(self) -> None:
        """The worker answered."""
        if self._open_until or self._failures:
            self._failures.clear()
            self._open_until, self._rest_s, self._trying = 0.0, REST_S, False

    def failed(self) -> None:
        """It could not be reached, or was lost."""
        now = self._clock()
        self._failures.append(now)
        if self._open_until:
            # Not while it is open already: all that were on it fail at once.
            if self._trying:
                self._rest_s = min(2 * self._rest_s, MOST_REST_S)
                self._open_until, self._trying = now + self._rest_s, False
        elif len(self._failures) == FAILURES and now - self._failures[0] <= WITHIN_S:
            self._open_until = now + self._rest_s


class RetryBudget:
    """Tries beyond the first, as a share of requests: a fleet that refuses everything must not get
    everything several times. A few are always there."""

    def __init__(self, share: float = 0.2, least: float = 10.0, most: float = 100.0) -> None:
        self._share, self._left, self._most = share, least, most

    def earn(self) -> None:
        """A request came."""
        self._left = min(self._left + self._share, self._most)

    def spend(self) -> bool:
        """Take a try, if there is one."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
