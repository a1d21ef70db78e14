"""Rows and events that are kept, and the cursors that count them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from rollout.dashboard.numbers import gap, told
from rollout.dashboard.ring import Ring, SeriesRing


@given(size=st.integers(1, 9), count=st.integers(0, 30), limit=st.integers(1, 12))
def test_a_reader_sees_each_value_once_and_in_order(size: int, count: int, limit: int) -> None:
    """One that reads after every second value, as far as they are kept."""
    ring: Ring[int] = Ring(size)
    cursor, seen = 0, []
    for value in range(count):
        ring.add(value)
        if value % 2:
            first, values = ring.since(cursor, limit)
            cursor = first + len(values)
            seen += values
    assert seen == sorted(set(seen))
    if size >= 2 and limit >= 2:
        assert seen == list(range(count - count % 2))
    first, rest = ring.since(cursor, 100)
    assert all(ring.since(0, 100)[1][-len(rest) :] == rest for _ in rest)
    assert ring.since(10**6, 5) == (count, [])


def test_a_column_that_begins_late_has_gaps_before() -> None:
    rows = SeriesRing(10)
    rows.add(1.0, {"a": 1.0})
    rows.add(2.0, {"a": math.nan, "b": -math.inf})
    rows.add(3.0, {"b": 2.0})
    page = rows.page(0, 10)
    assert page.columns == {"a": [1.0, None, None], "b": [None, None, 2.0]}
    assert (page.x, page.first, page.next, page.more) == ([1.0, 2.0, 3.0], 0, 3, False)
    assert rows.page(0, 2).more and rows.page(2, 2).x == [3.0]


def test_what_json_has_no_word_for() -> None:
    assert [told(x) for x in (math.nan, math.inf, -math.inf)] == ["NaN", "Infinity", "-Infinity"]
    assert (told(1.5), told(0), told(None)) == (1.5, 0, None)
    assert [gap(x) for x in (math.nan, math.inf, -math.inf, None, 0.0)] == [None] * 4 + [0.0]
