"""The tree of shared prefixes, checked against a reading of every page by every row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.sharing import find_shared_prefixes

PAGE = 4


def covered_columns(found, row: int) -> list[int]:
    """Columns that segments cover for a row, in order, with repetitions."""
    return [
        column
        for segment in found.segments
        if segment.row_start <= row < segment.row_stop
        for column in range(segment.page_start, segment.page_stop)
    ]


@st.composite
def batches(draw):
    """Page tables with nested shared prefixes: rows extend earlier rows' prefixes."""
    num_rows = draw(st.integers(1, 8))
    columns = 6
    table = np.zeros((num_rows, columns), dtype=np.int32)
    next_page = 1
    for row in range(num_rows):
        keep = draw(st.integers(0, columns)) if row else 0
        table[row, :keep] = table[row - 1, :keep]
        fresh = columns - keep
        table[row, keep:] = np.arange(next_page, next_page + fresh)
        next_page += fresh
    computed = np.array([draw(st.integers(0, columns * PAGE - 1)) for _ in range(num_rows)])
    return table, computed


@given(batches(), st.integers(1, 6))
def test_every_page_is_read_exactly_once_by_every_row(batch, min_saved) -> None:
    table, computed = batch
    found = find_shared_prefixes(table, computed, PAGE, min_pages_saved=min_saved)
    for row in range(len(computed)):
        own_start = found.own_start_R[row]
        assert covered_columns(found, row) == list(range(own_start))
        assert own_start * PAGE <= computed[row], "a shared page holds tokens of this step"
    for segment in found.segments:
        rows = table[segment.row_start : segment.row_stop, segment.page_start : segment.page_stop]
        assert (rows == rows[0]).all()
        saved = (segment.row_stop - segment.row_start - 1) * (
            segment.page_stop - segment.page_start
        )
        assert saved >= min_saved


def test_groups_under_a_common_prefix_form_two_levels() -> None:
    few_shot, tails = [1, 2, 3], {0: [4, 5], 1: [6, 7]}
    rows = [few_shot + tails[g] + [10 + 2 * g + s] for g in (0, 1) for s in (0, 1)]
    table = np.array(rows, dtype=np.int32)
    found = find_shared_prefixes(table, np.full(4, 5 * PAGE + 1), PAGE, min_pages_saved=2)
    as_tuples = {(s.row_start, s.row_stop, s.page_start, s.page_stop) for s in found.segments}
    assert as_tuples == {(0, 4, 0, 3), (0, 2, 3, 5), (2, 4, 3, 5)}
    assert found.own_start_R.tolist() == [5, 5, 5, 5]


def test_nothing_is_shared_by_one_row() -> None:
    found = find_shared_prefixes(np.ones((1, 3), dtype=np.int32), np.array([12]), PAGE, 1)
    assert found.segments == []
    assert found.own_start_R.tolist() == [0]
