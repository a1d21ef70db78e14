"""Rewards and returns of single tokens against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from recipes.algorithms.kl import k1
from recipes.algorithms.returns import returns_to_go, token_rewards

KL = k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.8]))


def test_the_kl_is_on_every_token_and_the_score_on_the_last() -> None:
    assert KL.tolist() == pytest.approx([0.5, -0.2])
    rewards = token_rewards(1.0, 2, KL, 0.1)
    assert rewards.tolist() == pytest.approx([-0.05, 1.02])
    assert returns_to_go(rewards).tolist() == pytest.approx([0.97, 1.02])


def test_without_a_kl_only_the_last_token_earns() -> None:
    assert token_rewards(0.5, 3).tolist() == [0.0, 0.0, 0.5]


def test_what_comes_later_is_worth_less() -> None:
    rewards = torch.tensor([1.0, 0.0, 4.0])
    assert returns_to_go(rewards, 0.5).tolist() == [2.0, 2.0, 4.0]
    assert returns_to_go(rewards, 1 - 1e-12).tolist() == pytest.approx([5.0, 4.0, 4.0])
    assert returns_to_go(rewards).tolist() == [5.0, 4.0, 4.0]


def test_a_score_alone_comes_through_to_the_bit() -> None:
    score = float(torch.tensor(1 / 3))
    assert returns_to_go(token_rewards(score, 1000)).tolist() == [score] * 1000
