"""Matchers at the beginning of a grammar, and which of them the rows of a step go on from.

llguidance's copies of a matcher share what its lexer has learned, behind a lock: masks of copies
that are asked for at once take as long as one by one. Matchers that were compiled apart do not wait
for one another; so a grammar that many rows follow is compiled several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llguidance import LLMatcher

ROWS_OF_A_START = 4
"""Fewer rows are not worth another start."""
_MOST_REPLAYED = 256
"""Output tokens of a row that is moved to another start, which consumes all of them again."""


@dataclass(kw_only=True)
class Start:
    """matcher: stays at the beginning. serial: one asks the matchers of equal serials in turn.
    num_rows: that follow copies of it."""

    matcher: LLMatcher
    serial: int = 0
    num_rows: int = 0


class FollowingRow(Protocol):
    """A row that goes on from a start (`following.Following`)."""

    start: Start

    @property
    def num_fed(self) -> int:
        """Tokens that another start would have to consume for it."""
        ...

    def join(self, start: Start) -> None:
        """Go on from that one."""
        ...


def least_followed(starts: Sequence[Start]) -> Start:
    """The start for one row more."""
    return min(starts, key=lambda start: start.num_rows)


def spread(rows: Iterable[FollowingRow], starts: Sequence[Start]) -> None:
    """Move rows from starts that have many to those that have few. The rows follow one grammar,
    whose starts these are."""
    if len(starts) < 2:
        return
    share = sum(start.num_rows for start in starts) / len(starts)
    most = share + max(1.0, share / 4)
    if all(start.num_rows <= most for start in starts):
        return
    for following in rows:
        if following.start.num_rows <= most or following.num_fed > _MOST_REPLAYED:
            continue
        other = least_followed(starts)
        if other.num_rows + 1 >= following.start.num_rows:
            return
        following.join(other)
