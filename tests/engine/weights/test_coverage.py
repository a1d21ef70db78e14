"""Which elements came: disjoint ranges, against a set of indices."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from engine.errors import ManifestMismatch
from engine.weights.coverage import Coverage


@pytest.mark.parametrize("seed", range(20))
def test_ranges_in_any_order_cover_like_a_set(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 63)
    cuts = sorted({0, size, *(rng.randint(0, size) for _ in range(6))})
    ranges = list(pairwise(cuts))
    rng.shuffle(ranges)
    coverage, came = Coverage("w", size), set()
    for start, stop in ranges:
        assert not coverage.complete
        coverage.add(start, stop)
        came |= set(range(start, stop))
        missing = coverage.missing
        if missing is None:
            assert len(came) == size
        else:
            assert missing[0] == min(set(range(size)) - came)
            assert came.isdisjoint(range(*missing))
    assert coverage.complete


@pytest.mark.parametrize("start,stop", [(2, 4), (0, 3), (4, 9), (0, 10), (3, 4), (2, 6)])
def test_elements_that_come_twice_are_named(start: int, stop: int) -> None:
    coverage = Coverage("w", 10)
    coverage.add(2, 6)
    coverage.add(8, 10)
    with pytest.raises(ManifestMismatch, match=rf"elements \[{start}, {stop}\) of w came twice"):
        coverage.add(start, stop)
    coverage.add(6, 8)
    coverage.add(0, 2)
    assert coverage.complete


@pytest.mark.parametrize("start,stop", [(-1, 3), (3, 2), (9, 11)])
def test_elements_that_are_none(start: int, stop: int) -> None:
    with pytest.raises(ManifestMismatch, match="w has no elements"):
        Coverage("w", 10).add(start, stop)


def test_an_empty_piece_covers_nothing() -> None:
    coverage = Coverage("w", 4)
    coverage.add(2, 2)
    assert coverage.missing == (0, 4)
    coverage.add(0, 4)
    coverage.add(2, 2)
    assert coverage.complete
