"""The clipped value loss in closed form, its gradient, and the variance a critic explains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.algorithms.values import (
    ValueInputs,
    explained_variance,
    token_value_loss,
    value_loss,
)

VALUES, OLD, RETURNS = (0.9, 0.1, 0.55), (0.5, 0.5, 0.5), (0.2, 0.6, 1.0)
CLIP = 0.2


def inputs() -> ValueInputs:
    return ValueInputs(
        values=torch.tensor(VALUES, requires_grad=True),
        old=torch.tensor(OLD),
        returns=torch.tensor(RETURNS),
        weights=torch.tensor([1.0, 2.0, 4.0]),
    )


def test_the_worse_of_the_value_and_the_one_kept_near_counts() -> None:
    given = inputs()
    loss_K = token_value_loss(given.values, given.old, given.returns, CLIP)
    assert loss_K.tolist() == pytest.approx([0.245, 0.125, 0.10125])


def test_tokens_are_weighted_and_the_clipped_ones_have_no_gradient() -> None:
    """A value that has moved beyond the clip towards its return, and only that, is held."""
    given = inputs()
    moved = ValueInputs(
        values=torch.tensor([0.9, 0.1, 0.8], requires_grad=True),
        old=given.old,
        returns=given.returns,
        weights=given.weights,
    )
    output = value_loss(moved, CLIP)
    assert float(output.loss.detach()) == pytest.approx(0.245 + 2 * 0.125 + 4 * 0.5 * 0.3**2)
    assert output.clipped.tolist() == [False, False, True]
    output.loss.backward()
    assert moved.values.grad is not None
    assert moved.values.grad.tolist() == pytest.approx([0.7, 2 * -0.5, 0.0])


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic() -> None:
    returns = np.array([0.0, 1.0, 1.0, 0.0], np.float32)
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(np.full(4, 0.3, np.float32), returns) == pytest.approx(0.0)
    assert explained_variance(1 - returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones(4, np.float32)) == 0.0
