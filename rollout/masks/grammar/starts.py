"""Matchers at the beginning of a grammar, and which of them a row goes on from.

llguidance's copies of a matcher share what its lexer has learned, behind a lock: masks of copies
that are asked for at once take as long as one by one. Matchers that were compiled apart do not wait
for one another; so a grammar that many rows follow is compiled several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

ROWS_OF_A_START = 4
"""Fewer rows are not worth another start."""


@dataclass(kw_only=True)
class Start:
    """matcher: stays at the beginning. serial: of no other start.
    num_rows: that follow copies of it."""

    matcher: LLMatcher
    serial: int = 0
    num_rows: int = 0


def least_followed(starts: Sequence[Start]) -> Start:
    """The start for one row more."""
    return min(starts, key=lambda start: start.num_rows)
