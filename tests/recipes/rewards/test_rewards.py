"""Rewards: exact, mathematical, and the over-long penalty."""

from __future__ import annotations

import pytest

from recipes.rewards.exact import exact_match
from recipes.rewards.math import math_match
from recipes.rewards.shaping import overlong_penalty


def test_exact_match_forgives_white_space_only() -> None:
    assert exact_match(" 42\n", "42") == 1.0
    assert exact_match("42.", "42") == 0.0


@pytest.mark.parametrize(
    "reply,answer,expected",
    [
        ("The answer is 8", "8", 1.0),
        ("so $\\frac{1}{2}$", "0.5", 1.0),
        ("\\boxed{3}", "3", 1.0),
        ("7", "8", 0.0),
        ("no idea", "8", 0.0),
        ("yes", "yes", 1.0),
    ],
)
def test_math_match(reply: str, answer: str, expected: float) -> None:
    assert math_match(reply, answer) == expected


def test_overlong_penalty_grows_over_the_buffer() -> None:
    assert [overlong_penalty(n, 10, 4) for n in (5, 6, 8, 10)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(10, 10, 0) == 0.0
