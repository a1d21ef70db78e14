"""How many tokens may be drafted for each row of a step, and into which bucket its rows fall."""

from __future__ import annotations

from bisect import bisect_left

from engine.config import DRAFT_LADDER, MAX_VERIFY_ROWS, ROW_BUCKETS


def rungs(num_rows: int, draft_tokens: int) -> tuple[int, ...]:
    """The draft lengths, ascending, that `num_rows` rows may have where `draft_tokens` is the
    most that the configuration allows; empty if none."""
    return tuple(
        k for k in DRAFT_LADDER if k <= draft_tokens and num_rows * (k + 1) <= MAX_VERIFY_ROWS
    )


def rung_of(k: int) -> int:
    """The rung that a step with `k` drafts at most runs on; 0 of a plain one."""
    return k if k == 0 else next(rung for rung in DRAFT_LADDER if k <= rung)


def row_bucket(num_rows: int) -> int:
    """The rows, as the graphs pad them, that a step of `num_rows` costs the time of."""
    place = bisect_left(ROW_BUCKETS, num_rows)
    return ROW_BUCKETS[place] if place < len(ROW_BUCKETS) else -(-num_rows // 256) * 256
