"""Rows that follow one grammar, divided among the matchers that they may go on from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rollout.masks.grammar.following import Following
from rollout.masks.grammar.starts import Start, least_followed

_MOST_REPLAYED = 256
"""Output tokens of a row that is moved to another start, which consumes all of them again."""


def spread(rows: Iterable[Following], starts: Sequence[Start]) -> None:
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
