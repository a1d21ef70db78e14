"""The balance loss against Switch's formula by hand, and what is logged of loads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recipes.trainers.balance import balance_loss, load_entropy, max_violation


def test_an_even_spread_costs_one_and_a_single_expert_costs_their_number() -> None:
    ids_TK = torch.arange(8).view(4, 2) % 4
    assert float(balance_loss(torch.full((4, 4), 0.25), ids_TK)) == pytest.approx(1.0)
    one = torch.zeros(4, 4)
    one[:, 2] = 1.0
    assert float(balance_loss(one, torch.full((4, 1), 2))) == pytest.approx(4.0)


def test_the_formula_by_hand() -> None:
    shares_TE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    ids_TK = torch.tensor([[0, 1], [1, 2]])
    # f = 1/4, 2/4, 1/4; P = 0.3, 0.45, 0.25.
    want = 3 * (0.25 * 0.3 + 0.5 * 0.45 + 0.25 * 0.25)
    assert float(balance_loss(shares_TE, ids_TK)) == pytest.approx(want)


def test_its_gradient_takes_from_the_busiest() -> None:
    logits_TE = torch.zeros(6, 3, requires_grad=True)
    balance_loss(logits_TE.softmax(-1), torch.tensor([[0]] * 4 + [[1]] * 2)).backward()
    assert logits_TE.grad is not None
    falls = logits_TE.grad.sum(0)
    assert falls[0] > falls[1] > falls[2]


def test_entropy_and_violation_of_loads() -> None:
    even, one = np.full((2, 8), 5), np.zeros((2, 8), dtype=np.int64)
    one[:, 3] = 40
    assert load_entropy(even) == pytest.approx(math.log(8))
    assert max_violation(even) == pytest.approx(0.0)
    assert load_entropy(one) == 0.0
    assert max_violation(one) == pytest.approx(7.0)
    assert load_entropy(np.concatenate([even, one])) == pytest.approx(math.log(8) / 2)
