"""Batches: advantages in place, weights by update, minibatches of whole groups."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from recipes.algorithms.presets import preset
from recipes.batching import make_batch, minibatches
from tests.helpers.trajectories import random_groups

GROUPS = random_groups(5, 4, vocab=9)


def test_advantages_follow_the_trajectories() -> None:
    batch = make_batch(GROUPS, preset("dr_grpo", 8), 8)
    expected = np.concatenate([g.rewards - g.rewards.mean() for g in GROUPS])
    assert batch.advantages == pytest.approx(expected)
    assert [t.reward for t in batch.trajectories] == [
        t.reward for g in GROUPS for t in g.trajectories
    ]


def test_one_update_is_the_batch_itself() -> None:
    algorithm = preset("grpo", 8)
    batch = make_batch(GROUPS, algorithm, 8)
    assert minibatches(batch, algorithm, 8, seed=0) == [batch]


def test_minibatches_deal_whole_groups_with_weights_of_their_own() -> None:
    algorithm = dataclasses.replace(preset("grpo", 8), num_minibatches=2)
    batch = make_batch(GROUPS, algorithm, 8)
    parts = minibatches(batch, algorithm, 8, seed=0)
    assert [len(p.trajectories) for p in parts] == [12, 8]
    dealt = sorted(id(t) for p in parts for t in p.trajectories)
    assert dealt == sorted(id(t) for t in batch.trajectories)
    for part in parts:
        lengths = np.array([len(t.response_ids) for t in part.trajectories])
        assert float((part.weights * lengths).sum()) == pytest.approx(1.0)
        prompts = [t.prompt_ids.tobytes() for t in part.trajectories]
        assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, len(prompts), 4))


def test_the_shuffle_follows_the_seed() -> None:
    algorithm = dataclasses.replace(preset("grpo", 8), num_minibatches=5)
    batch = make_batch(GROUPS, algorithm, 8)

    def order(seed: int) -> list[int]:
        parts = minibatches(batch, algorithm, 8, seed=seed)
        return [id(p.trajectories[0]) for p in parts]

    assert order(1) == order(1)
    assert order(1) != order(2)
