"""Spans of weight versions, joined and cut."""

from __future__ import annotations

import pytest

from engine.protocol import VersionSpan
from rollout.requests.version_spans import clip_spans, join_spans


def spans(*rows: tuple[int, int, int]) -> list[VersionSpan]:
    return [VersionSpan(version, start, end) for version, start, end in rows]


def test_neighbours_of_one_version_are_joined_and_empty_spans_left_out() -> None:
    found = join_spans(spans((1, 0, 3), (1, 3, 5), (2, 5, 5), (1, 5, 6), (2, 6, 9)))
    assert found == spans((1, 0, 6), (2, 6, 9))
    assert join_spans([]) == []


@pytest.mark.parametrize(
    "start,end,want",
    [
        (0, 9, [(1, 0, 4), (2, 4, 9)]),
        (2, 4, [(1, 2, 4)]),
        (3, 6, [(1, 3, 4), (2, 4, 6)]),
        (4, 4, []),
        (0, 99, [(1, 0, 4), (2, 4, 9)]),
    ],
)
def test_a_clip_says_what_the_spans_say_of_its_positions(
    start: int, end: int, want: list[tuple[int, int, int]]
) -> None:
    assert clip_spans(spans((1, 0, 4), (2, 4, 9)), end, start=start) == spans(*want)
