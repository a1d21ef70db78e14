"""Groups and tiles, against every way to choose them and a reading of every page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.groups import (
    GroupRule,
    GroupTracker,
    SharedGroup,
    find_groups,
    most_tiles,
    tile_groups,
)

PAGE = 4
RULE = GroupRule(unit=2 * PAGE, min_rows=2, min_tokens=2 * PAGE, tile_rows=3, max_kv_len=20)


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


@given(batches())
def test_rows_of_a_group_hold_the_same_pages(batch) -> None:
    table, computed = batch
    kv_lens = computed + 1
    groups = find_groups(table, kv_lens, PAGE, RULE)
    last = 0
    for group in groups:
        assert last <= group.row_start < group.row_stop - 1
        last = group.row_stop
        assert group.tokens > 0 and group.tokens % RULE.unit == 0
        rows = slice(group.row_start, group.row_stop)
        assert (
            table[rows, : group.tokens // PAGE] == table[last - 1, : group.tokens // PAGE]
        ).all()
        assert (group.tokens < kv_lens[rows]).all() and (kv_lens[rows] <= RULE.max_kv_len).all()


def brute_force(common: list[int], rows: int) -> int:
    """Most reads that any choice of groups saves."""
    best = [0] * (rows + 1)
    for stop in range(1, rows + 1):
        best[stop] = best[stop - 1]
        for start in range(stop - 1):
            saved = RULE.saved(stop - start, min(common[start : stop - 1]))
            best[stop] = max(best[stop], best[start] + saved)
    return best[rows]


@given(st.lists(st.integers(0, 3), max_size=7))
def test_the_groups_save_nearly_the_most_reads(units) -> None:
    """Row r shares units[r] units with row r + 1. Only neighbours of a group may be missed."""
    rows = len(units) + 1
    columns = 8
    table = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    for row, shared in enumerate(units):
        table[row + 1, : 2 * shared] = table[row, : 2 * shared]
    # Three units are more than lie before the last token: two count.
    groups = find_groups(table, np.full(rows, 20), PAGE, RULE)
    saved = sum(RULE.saved(g.row_stop - g.row_start, g.tokens) for g in groups)
    most = brute_force([min(unit, 2) * RULE.unit for unit in units], rows)
    assert 0.8 * most <= saved <= most


def test_a_group_inside_a_wider_one_wins_when_it_saves_more() -> None:
    table = np.zeros((6, 4), dtype=np.int32)
    table[:3, 2:], table[3:, 2:] = [1, 2], [3, 4]
    kv_lens = np.full(6, 18)
    assert find_groups(table, kv_lens, PAGE, RULE) == [SharedGroup(0, 3, 16), SharedGroup(3, 6, 16)]
    assert find_groups(table[:, :2], kv_lens - 8, PAGE, RULE) == [SharedGroup(0, 6, 8)]


@given(batches())
def test_tiles_cover_each_grouped_row_once(batch) -> None:
    table, computed = batch
    rows = len(computed)
    groups = find_groups(table, computed + 1, PAGE, RULE)
    packed = tile_groups(groups, rows, RULE)
    tiles = most_tiles(rows, RULE)
    triples, tokens_R = packed[: 3 * tiles].reshape(tiles, 3), packed[3 * tiles :]
    want = np.zeros(rows, dtype=np.int32)
    for group in groups:
        want[group.row_start : group.row_stop] = group.tokens
    np.testing.assert_array_equal(tokens_R, want)
    covered = np.zeros(rows, dtype=np.int32)
    for first, count, tokens in triples:
        assert count <= RULE.tile_rows
        assert (tokens > 0) == (count > 0)
        covered[first : first + count] += tokens
    np.testing.assert_array_equal(covered, want)


@pytest.mark.parametrize("rows", range(1, 40))
def test_there_is_a_tile_for_every_group(rows: int) -> None:
    rule = GroupRule(unit=1, min_rows=3, min_tokens=1, tile_rows=5, max_kv_len=100)
    for size in range(rule.min_rows, rows + 1):
        groups = [SharedGroup(at, at + size, 1) for at in range(0, rows - size + 1, size)]
        assert np.count_nonzero(tile_groups(groups, rows, rule)[-rows:]) == len(groups) * size


def tracked(tracker: GroupTracker, slots, kv_lens, pages) -> list[SharedGroup]:
    tracker.update(np.array(slots, dtype=np.int32), np.array(kv_lens, dtype=np.int32), pages)
    return tracker.groups


def test_groups_are_found_anew_only_when_they_may_have_changed() -> None:
    pages = np.arange(24, dtype=np.int32).reshape(4, 6)
    pages[2, :4] = pages[0, :4]
    tracker = GroupTracker(PAGE, RULE)
    assert tracked(tracker, [0, 2], [17, 18], pages) == [SharedGroup(0, 2, 16)]
    version = tracker.version
    pages[0, 4] = 77  # its own next page
    assert tracked(tracker, [0, 2], [18, 19], pages) == [SharedGroup(0, 2, 16)]
    assert tracker.version == version
    # Rows leave and come.
    assert tracked(tracker, [0, 1], [19, 9], pages) == []
    assert tracked(tracker, [1, 0, 2], [9, 20, 20], pages) == [SharedGroup(1, 3, 16)]
    # Slot 2 passes to a sequence of the same length plus one, of which one page is another.
    pages[2, 1] = 88
    version = tracker.version
    assert tracked(tracker, [1, 0, 2], [10, 20, 20], pages) == []
    assert tracker.version > version


def test_a_row_that_outgrows_the_rule_leaves_its_group() -> None:
    pages = np.zeros((3, 6), dtype=np.int32)
    tracker = GroupTracker(PAGE, RULE)
    assert tracked(tracker, [0, 1, 2], [19, 17, 20], pages) == [SharedGroup(0, 3, 16)]
    assert tracked(tracker, [0, 1, 2], [20, 18, 21], pages) == [SharedGroup(0, 2, 16)]


def test_sequences_in_the_slots_of_others_are_looked_at() -> None:
    """Rows that shared nothing are gone; those in their slots are shorter and share."""
    pages = np.arange(12, dtype=np.int32).reshape(2, 6)
    tracker = GroupTracker(PAGE, RULE)
    assert tracked(tracker, [0, 1], [15, 15], pages) == []
    pages[1] = pages[0]
    assert tracked(tracker, [0, 1], [14, 12], pages) == [SharedGroup(0, 2, 8)]
