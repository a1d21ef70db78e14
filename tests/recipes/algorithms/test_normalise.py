"""Whitening, and moments that come bit by bit, against the same of all at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from recipes.algorithms.normalise import Moments, whiten


def test_advantages_of_two_groups_whitened_over_their_tokens() -> None:
    """Rewards (1, 0) and (1, 1) less their means, on replies of 1, 3, 2 and 2 tokens."""
    values = torch.tensor([0.5, *[-0.5] * 3, *[0.0] * 4])
    expected = [1.76777, *[-1.06066] * 3, *[0.35355] * 4]
    assert whiten(values).tolist() == pytest.approx(expected, abs=1e-5)


def test_what_is_not_counted_has_no_part() -> None:
    values = torch.tensor([1.0, 2.0, 50.0, 3.0])
    counted = torch.tensor([True, True, False, True])
    assert whiten(values, counted).tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("values", [[], [4.0], [4.0, 4.0, 4.0]])
def test_without_spread_nothing_is_better_than_the_rest(values: list[float]) -> None:
    assert whiten(torch.tensor(values)).tolist() == [0.0] * len(values)


def test_moments_in_parts_are_those_of_all() -> None:
    values = np.random.default_rng(0).normal(100.0, 3.0, 60)
    moments = Moments()
    for part in (values[:1], values[1:20], values[20:20], values[20:]):
        moments = moments.including(part)
    assert moments.count == 60
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
    assert moments.squares / 59 == pytest.approx(values.var(ddof=1), rel=1e-9)
    expected = (values[0] - values.mean()) / values.std(ddof=1)
    assert moments.normalised(values[0]) == pytest.approx(expected, rel=1e-6)
    assert Moments(**dataclasses.asdict(moments)) == moments


def test_units_and_back() -> None:
    moments = Moments().including([10.0, 14.0])
    values = np.array([12.0, 10.0, 500.0], np.float32)
    units = moments.in_units(values)
    assert units.tolist() == pytest.approx([0.0, -2 / 8**0.5, 488 / 8**0.5], rel=1e-5)
    assert moments.from_units(units).tolist() == pytest.approx(values.tolist(), rel=1e-6)
    for without_spread in (Moments(), Moments().including([3.0, 3.0])):
        assert without_spread.in_units(values) is without_spread.from_units(values) is values


def test_rewards_are_clipped_at_ten_deviations() -> None:
    moments = Moments().including([0.0, 1.0])
    assert (moments.normalised(1e3), moments.normalised(-1e3)) == (10.0, -10.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0]])
def test_a_reward_says_nothing_before_two_have_differed(values: list[float]) -> None:
    assert Moments().including(values).normalised(1.0) == 0.0
