"""When a controller that drafts nothing tries a few steps with drafts."""

from __future__ import annotations

_FIRST_WAIT = 8
_SHORTEST_WAIT = 64
_LONGEST_WAIT = 512
_NUM_ROWS = 48
_MIN_STEPS = 3
_MAX_STEPS = 32


class Probes:
    """Short runs of verify steps, rarer by half after each that came to nothing.

    A probe ends when it has seen 48 rows, or after 32 steps.
    """

    def __init__(self) -> None:
        self.k = 0
        """Drafts of the probe that runs; 0 while none does."""
        self.num_failed = 0
        """Probes in a row that came to nothing."""
        self._wait = _FIRST_WAIT
        self._interval = _SHORTEST_WAIT
        self._num_steps = 0
        self._num_rows = 0

    @property
    def due(self) -> bool:
        """Whether one may start."""
        return self.k == 0 and self._wait <= 0

    @property
    def complete(self) -> bool:
        """Whether the one that runs has seen enough."""
        enough = self._num_rows >= _NUM_ROWS and self._num_steps >= _MIN_STEPS
        return enough or self._num_steps >= _MAX_STEPS

    def start(self, k: int) -> None:
        """The next steps have `k` drafts."""
        self.k, self._num_steps, self._num_rows = k, 0, 0

    def end(self) -> None:
        """The one that runs, if any, or drafting at all, came to nothing."""
        self.k, self._wait = 0, self._interval
        self.num_failed += 1
        self._interval = min(2 * self._interval, _LONGEST_WAIT)

    def succeed(self) -> None:
        """Drafting pays: the next time that it ceases to, look again soon."""
        self.k, self._interval, self.num_failed = 0, _SHORTEST_WAIT, 0

    def planned(self, k: int) -> None:
        """A step with `k` drafts was planned: fewer than asked for where requests allow no more."""
        if self.k == 0:
            self._wait -= 1
        elif k:
            self._num_steps += 1

    def observe(self, num_rows: int, k: int) -> None:
        """A step of `k` drafts showed what comes of them in `num_rows` rows."""
        if self.k and k:
            self._num_rows += num_rows
