"""Marks of KV pages that hold zeros for NaN."""

from __future__ import annotations

import numpy as np

from engine.kv.spoilt import SpoiltPages


def rows(spoilt: SpoiltPages, pages: list[list[int]], kv_lens: list[int]) -> list[bool]:
    return spoilt.rows(np.array(pages, np.int32), np.array(kv_lens), 4).tolist()


def test_a_row_is_spoilt_by_a_marked_page_it_reads() -> None:
    spoilt = SpoiltPages(8)
    assert rows(spoilt, [[1, 2]], [8]) == [False]
    spoilt.mark(np.array([2, 2]))
    assert rows(spoilt, [[1, 2], [3, 2], [1, 2], [4, 5]], [8, 4, 5, 8]) == [
        True,
        False,
        True,
        False,
    ]


def test_a_mark_follows_copies_and_ends_when_the_page_is_begun() -> None:
    spoilt = SpoiltPages(8)
    spoilt.copied(np.array([0]), np.array([1]))
    spoilt.mark(np.array([2]))
    spoilt.copied(np.array([2]), np.array([6]))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [True, True]
    spoilt.begun(np.array([2]))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [False, True]
    spoilt.copied(np.array([3]), np.array([6]))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [False, False]
