"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.algorithms.advantages import advantages

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_group_norm_divides_by_the_unbiased_std() -> None:
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3) + 1e-4
    got = advantages(REWARDS, "group_norm")
    expected = [[0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std], [0.0] * 4]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_group_mean_only_centres() -> None:
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4])
    torch.testing.assert_close(advantages(REWARDS, "group_mean"), expected)


def test_leave_one_out_compares_with_the_others() -> None:
    expected = torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0] * 4])
    torch.testing.assert_close(advantages(REWARDS, "leave_one_out"), expected)


@pytest.mark.parametrize("estimator", ["group_norm", "group_mean", "leave_one_out"])
def test_a_single_sample_has_no_advantage(estimator: str) -> None:
    assert advantages(torch.tensor([[3.0]]), estimator).tolist() == [[0.0]]  # type: ignore[arg-type]


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="gae"):
        advantages(REWARDS, "gae")  # type: ignore[arg-type]
