"""How often what serves may fail before nobody starts it again."""

from __future__ import annotations

from collections import deque

MAX_FAILURES = 3
WINDOW_S = 600.0


class FailureWindow:
    """Counts failures: the third within ten minutes is the last."""

    def __init__(self) -> None:
        self._failures: deque[float] = deque()

    def may_try(self, now: float) -> bool:
        """Note a failure at `now`, of `time.monotonic`; whether to start again after it."""
        self._failures.append(now)
        while now - self._failures[0] > WINDOW_S:
            self._failures.popleft()
        return len(self._failures) < MAX_FAILURES

    def __len__(self) -> int:
        return len(self._failures)
