"""Advantages and returns in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.algorithms.gae import gae

REWARDS = np.array([0, 0, 1], np.float32)
VALUES = np.array([0.5, 0.6, 0.7], np.float32)


def test_the_reward_of_the_last_token_reaches_the_first() -> None:
    advantages, returns = gae(REWARDS, VALUES, gamma=1.0, lam=0.95)
    assert advantages == pytest.approx([0.46575, 0.385, 0.3])
    assert returns == pytest.approx([0.96575, 0.985, 1.0])
    assert advantages.dtype == returns.dtype == np.float32


def test_discount_and_lambda_both_count() -> None:
    advantages, _ = gae(REWARDS, VALUES, gamma=0.9, lam=0.5)
    assert advantages == pytest.approx([0.11425, 0.165, 0.3])


def test_tokens_that_were_not_sampled_are_passed_over() -> None:
    """They neither discount nor bring in their values, which say nothing."""
    rewards = np.array([0, 0, 0, 1], np.float32)
    values = np.array([0.5, np.nan, np.nan, 0.7], np.float32)
    sampled = np.array([True, False, False, True])
    advantages, returns = gae(rewards, values, gamma=1.0, lam=0.95, sampled_L=sampled)
    assert advantages == pytest.approx([0.485, 0, 0, 0.3])
    assert returns == pytest.approx([0.985, 0, 0, 1.0])


def test_without_lambda_or_with_all_of_it() -> None:
    """One step of temporal difference, and the return less the value."""
    rewards = np.array([0.1, -0.2, 1], np.float32)
    one_step, _ = gae(rewards, VALUES, gamma=0.9, lam=0.0)
    assert one_step == pytest.approx([0.1 + 0.54 - 0.5, -0.2 + 0.63 - 0.6, 0.3])
    _, returns = gae(rewards, VALUES, gamma=0.9, lam=1.0)
    assert returns == pytest.approx([0.1 + 0.9 * (-0.2 + 0.9), -0.2 + 0.9, 1.0])


def test_a_response_without_a_sampled_token_has_nothing() -> None:
    nothing = np.zeros(2, np.bool_)
    advantages, returns = gae(REWARDS[:2], VALUES[:2], gamma=1, lam=1, sampled_L=nothing)
    assert not advantages.any() and not returns.any()
