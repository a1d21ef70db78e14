"""Marks of KV pages that hold zeros for NaN."""

from __future__ import annotations

import numpy as np

from engine.kv.spoilt import SpoiltPages


def rows(spoilt: SpoiltPages, pages: list[list[int]], kv_lens: list[int]) -> list[bool]:
    return spoilt.rows(np.array(pages, np.int32), np.array(kv_lens), 4).tolist()


def places(*pairs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pages and positions in them."""
    pages, positions = np.array(pairs, np.int64).T
    return pages, positions


def test_a_row_is_spoilt_by_a_marked_position_it_reads() -> None:
    spoilt = SpoiltPages(8)
    assert rows(spoilt, [[1, 2]], [8]) == [False]
    spoilt.mark(*places((2, 3), (2, 1)))
    assert rows(spoilt, [[1, 2], [3, 2], [1, 2], [4, 5]], [8, 4, 6, 8]) == [
        True,
        False,
        True,
        False,
    ]
    assert rows(spoilt, [[1, 2], [2, 1]], [5, 1]) == [False, False]


def test_a_mark_follows_copies_and_ends_when_its_position_is_written() -> None:
    spoilt = SpoiltPages(8)
    spoilt.copied(np.array([0]), np.array([1]))
    spoilt.mark(*places((2, 0)))
    spoilt.copied(np.array([2]), np.array([6]))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [True, True]
    spoilt.written(*places((2, 1)))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [True, True]
    spoilt.written(*places((2, 0)))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [False, True]
    spoilt.copied(np.array([3]), np.array([6]))
    assert rows(spoilt, [[2], [6]], [1, 1]) == [False, False]


def test_who_takes_over_what_lies_before_a_mark_writes_over_it() -> None:
    spoilt = SpoiltPages(4)
    spoilt.mark(*places((1, 2)))
    spoilt.copied(np.array([1]), np.array([3]))
    assert rows(spoilt, [[3]], [2]) == [False]
    spoilt.written(*places((3, 2), (3, 3)))
    assert rows(spoilt, [[3], [1]], [4, 4]) == [False, True]
