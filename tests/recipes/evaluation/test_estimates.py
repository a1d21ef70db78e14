"""pass@k in closed form and by trying all draws; means, their errors, and what is left out."""

from __future__ import annotations

import itertools
import math

import pytest

from recipes.evaluation.estimates import Outcome, pass_at_k, summarise


@pytest.mark.parametrize("k,expected", [(1, 0.375), (4, 0.92857), (8, 1.0)])
def test_pass_at_k_in_closed_form(k: int, expected: float) -> None:
    assert pass_at_k(8, 3, k) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("num,right", [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (6, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(num: int, right: int) -> None:
    replies = [True] * right + [False] * (num - right)
    for k in range(1, num + 1):
        draws = [any(draw) for draw in itertools.combinations(replies, k)]
        assert pass_at_k(num, right, k) == pytest.approx(sum(draws) / len(draws))


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5)


def test_the_figures_of_a_set() -> None:
    outcomes = [
        Outcome(greedy=1.0, samples=(1.0, 0.0, 0.0, 0.0)),
        Outcome(greedy=0.0, samples=(1.0, 1.0, 0.5, 0.0)),
        Outcome(greedy=0.25, samples=(0.0, 0.0, 0.0, 0.0)),
    ]
    figures = summarise(outcomes, num_samples=4, ks=(1, 2))
    assert figures["accuracy"] == pytest.approx(1.25 / 3)
    assert figures["avg@4"] == pytest.approx((0.25 + 0.625) / 3)
    assert figures["pass@1"] == pytest.approx((0.25 + 0.5) / 3), "half a point is not right"
    assert figures["pass@2"] == pytest.approx((0.5 + 5 / 6) / 3)
    spread = [0.25, 0.625, 0.0]
    mean = sum(spread) / 3
    error = math.sqrt(sum((x - mean) ** 2 for x in spread) / 2 / 3)
    assert figures["avg@4/stderr"] == pytest.approx(error)
    assert figures["num_failed"] == 0


def test_what_could_not_be_graded_is_left_out_and_counted() -> None:
    outcomes = [
        Outcome(greedy=None, samples=(1.0,), num_failed=4),
        Outcome(greedy=1.0, samples=(1.0, 0.0, 1.0), num_failed=1),
        Outcome(greedy=0.0, samples=(), num_failed=4),
    ]
    figures = summarise(outcomes, num_samples=4, ks=(1, 2, 4))
    assert figures["accuracy"] == 0.5
    assert figures["avg@4"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["pass@2"] == 1.0
    assert "pass@2/stderr" not in figures and "pass@4" not in figures
    assert figures["num_failed"] == 9


def test_nothing_is_said_of_no_replies() -> None:
    failed = [Outcome(greedy=None, num_failed=1)]
    assert summarise(failed, num_samples=2, ks=(1,)) == {"num_failed": 1.0}
