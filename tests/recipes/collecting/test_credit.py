"""From the rewards of replies to the advantages of tokens, by every estimator."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch

from engine.protocol import FloatArray
from recipes.algorithms.advantages import GroupEstimator, advantages
from recipes.algorithms.normalise import Moments
from recipes.algorithms.presets import Algorithm, AlgorithmName, preset
from recipes.collecting.batching import make_batch
from recipes.collecting.credit import graded
from recipes.types import Group, Problem
from tests.helpers.trajectories import random_groups, trajectory

PROMPT = np.array([1, 2], np.int32)


def group(rewards: list[float], lengths: list[int], greedy: float | None = None) -> Group:
    replies = [trajectory(PROMPT, [3] * n, r) for r, n in zip(rewards, lengths, strict=True)]
    return Group(
        problem=Problem(question="", answer="", key=""),
        trajectories=tuple(replies),
        greedy=None if greedy is None else trajectory(PROMPT, [3], greedy),
    )


def flat(arrays: tuple[FloatArray, ...] | None) -> list[float]:
    assert arrays is not None
    return np.concatenate(arrays).tolist()


@pytest.mark.parametrize("estimator", get_args(GroupEstimator))
def test_a_group_is_compared_by_the_rewards_of_its_replies(estimator: GroupEstimator) -> None:
    """To the bit what the estimator makes of the rewards alone, on every token of a reply."""
    groups = random_groups(6, 4, vocab=9)
    rng = np.random.default_rng(3)
    groups = [
        dataclasses.replace(
            g,
            trajectories=tuple(
                dataclasses.replace(t, reward=float(rng.normal())) for t in g.trajectories
            ),
        )
        for g in groups
    ]
    algorithm = dataclasses.replace(preset("grpo", 8), advantage=estimator)
    batch = make_batch(groups, algorithm, 8)
    expected = [advantages(torch.from_numpy(g.rewards)[None], estimator)[0].numpy() for g in groups]
    for got, want in zip(batch.advantages, np.concatenate(expected), strict=True):
        assert got.tolist() == [want] * len(got)


def test_leave_one_out_of_four_rewards() -> None:
    batch = make_batch([group([1, 0, 0, 1], [1, 1, 1, 1])], preset("rloo", 8), 8)
    assert flat(batch.advantages) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_reinforce_with_the_mean_of_the_group_is_whitened_over_the_tokens() -> None:
    groups = [group([1, 0], [1, 3]), group([1, 1], [2, 2])]
    batch = make_batch(groups, preset("reinforce++-baseline", 8), 8)
    assert [a[0] for a in batch.advantages] == pytest.approx(
        [1.76777, -1.06066, 0.35355, 0.35355], abs=1e-5
    )


def with_kl(algorithm: Algorithm, coef: float) -> Algorithm:
    return dataclasses.replace(algorithm, kl_coef=coef, kl_in="reward", kl_estimator="k1")


OLD = (np.array([-1.0, -2.0], np.float32),)
REFERENCE = (np.array([-1.5, -1.8], np.float32),)


def test_every_token_has_what_is_still_to_come() -> None:
    algorithm = dataclasses.replace(with_kl(preset("reinforce++", 8), 0.1), whiten_advantages=False)
    batch = make_batch([group([1], [2])], algorithm, 8, old=OLD, reference=REFERENCE)
    assert flat(batch.token_rewards) == pytest.approx([-0.05, 1.02])
    assert flat(batch.advantages) == pytest.approx([0.97, 1.02])
    assert batch.reference_logprobs is None and batch.old_logprobs is OLD


def test_single_replies_to_several_problems_are_compared_with_each_other() -> None:
    groups = [group([1], [1]), group([0], [1]), group([0], [2])]
    batch = make_batch(groups, preset("reinforce++", 8), 8)
    assert flat(batch.advantages) == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert batch.learns.all()


def test_the_greedy_reply_is_the_baseline_of_each_token() -> None:
    algorithm = with_kl(preset("remax", 8), 0.1)
    groups = [group([1], [2], greedy=0.25)]
    batch = make_batch(groups, algorithm, 8, old=OLD, reference=REFERENCE)
    assert flat(batch.advantages) == pytest.approx([0.72, 0.77])
    assert len(batch.trajectories) == 1


@pytest.mark.parametrize("greedy,mixed", [(0.0, True), (0.1, False)])
def test_a_group_is_mixed_if_a_sample_differs_from_the_greedy_reply(
    greedy: float, mixed: bool
) -> None:
    assert group([0.1, 0.1], [1, 1], greedy=greedy).mixed is mixed
    assert not group([0.1, 0.1], [1, 1]).mixed


def test_a_kl_in_the_reward_counts_for_the_reply_as_a_whole() -> None:
    """What RLOO compares is the score less the KL of all tokens."""
    groups = [group([1, 0], [2, 2])]
    batch = make_batch(
        groups, with_kl(preset("rloo", 8), 0.1), 8, old=OLD * 2, reference=REFERENCE + OLD
    )
    assert flat(batch.advantages) == pytest.approx([0.97, 0.97, -0.97, -0.97])


def test_a_kl_in_the_loss_is_in_no_reward() -> None:
    algorithm = dataclasses.replace(preset("grpo", 8), kl_coef=0.1)
    batch = make_batch([group([1], [2])], algorithm, 8, reference=REFERENCE)
    assert flat(batch.token_rewards) == [0.0, 1.0]
    assert batch.reference_logprobs is REFERENCE


def test_rewards_are_taken_as_deviations() -> None:
    algorithm = dataclasses.replace(preset("remax", 8), normalise_rewards=True)
    moments = Moments().including([0.0, 1.0, 2.0])
    batch = make_batch([group([2], [2], greedy=0.0)], algorithm, 8, moments=moments)
    assert flat(batch.token_rewards) == pytest.approx([0.0, 1.0])
    assert flat(batch.advantages) == pytest.approx([2.0, 2.0])


def failed(group: Group, index: int) -> Group:
    replies = list(group.trajectories)
    replies[index] = dataclasses.replace(replies[index], failed="time", reward=0.0)
    return dataclasses.replace(group, trajectories=tuple(replies))


def test_a_reply_with_nothing_to_be_compared_with_does_not_learn() -> None:
    """Nor does whitening over the others give it an advantage."""
    alone = failed(group([1, 1], [1, 1]), 0)
    rest = group([1, 0, 0, 0], [1, 1, 1, 1])
    batch = make_batch([rest, alone], preset("reinforce++-baseline", 8), 8)
    assert flat(batch.advantages) == pytest.approx([1.5, -0.5, -0.5, -0.5, 0.0])
    ungraded = group([1], [1], greedy=0.0)
    assert ungraded.greedy is not None
    ungraded = dataclasses.replace(
        ungraded, greedy=dataclasses.replace(ungraded.greedy, failed="time")
    )
    assert flat(make_batch([ungraded], preset("remax", 8), 8).advantages) == [0.0]
    assert not ungraded.mixed


def test_rejected_tokens_have_no_part_in_whitening() -> None:
    algorithm = dataclasses.replace(preset("reinforce++", 8), is_level="token", is_mode="mask")
    groups = [group([1], [1]), group([0], [1]), group([5], [2]), group([0], [1])]
    old = [t.rollout_logprobs.copy() for t in graded(groups)]
    old[2] += 5.0
    batch = make_batch(groups, algorithm, 8, old=tuple(old))
    assert flat(batch.advantages) == pytest.approx([1.15470, -0.57735, 0, 0, -0.57735], abs=1e-5)


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_a_batch_in_which_nothing_was_graded_is_empty(name: AlgorithmName) -> None:
    lost = failed(failed(group([1, 0], [1, 2], greedy=0.0), 0), 1)
    batch = make_batch([lost], preset(name, 8), 8, teacher=())
    assert batch.trajectories == () and batch.advantages == ()
