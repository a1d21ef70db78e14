"""How many of the drafted tokens come true, by depth."""

from __future__ import annotations

import numpy as np

from engine.protocol import IntArray

MEMORY_ROWS = 64
"""Rows that an estimate remembers, where a step has few."""
MEMORY_STEPS = 16
"""Steps that it remembers where a step has many: rows of one step are alike."""
_PRIOR_ROWS = 4.0
"""Weight of what is supposed before a depth was seen."""


class Acceptance:
    """For each depth j a decayed mean of: of the rows that accepted j - 1 drafts, how many accepted
    one more. A row without a j-th draft counts as one that did not accept it, since it costs its
    virtual row all the same; so the means multiply to what a step with k drafts yields, whatever
    share of the rows a drafter finds anything for.

    Before any row is seen a depth is supposed to be as good as the one before it, and the first
    one worthless.
    """

    def __init__(self, max_depth: int) -> None:
        self._hits = [0.0] * max_depth
        self._rows = [0.0] * max_depth

    def observe(self, accepted: IntArray, k: int) -> None:
        """accepted: [S], drafts that came true for each row, of a step with k drafts."""
        passed = np.bincount(np.minimum(accepted, k), minlength=k + 1)[::-1].cumsum()[::-1]
        for depth in range(k):
            seen, hits = float(passed[depth]), float(passed[depth + 1])
            keep = 1.0 - min(seen / MEMORY_ROWS, 1.0 / MEMORY_STEPS)
            self._rows[depth] = self._rows[depth] * keep + seen
            self._hits[depth] = self._hits[depth] * keep + hits

    def forget(self, rows: float) -> None:
        """Trust what was seen no more than as many rows."""
        for depth, seen in enumerate(self._rows):
            if seen > rows:
                self._hits[depth] *= rows / seen
                self._rows[depth] = rows

    def tokens(self, k: int) -> float:
        """Tokens that a step with k drafts is expected to give a row, its own among them."""
        total, reached, rate = 1.0, 1.0, 0.0
        for hits, seen in zip(self._hits[:k], self._rows[:k], strict=True):
            rate = (hits + _PRIOR_ROWS * rate) / (seen + _PRIOR_ROWS)
            reached *= rate
            total += reached
        return total
