"""Batches: advantages in place, weights by update, minibatches of whole groups."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from recipes.algorithms.losses import policy_loss
from recipes.algorithms.presets import preset
from recipes.collecting.batching import make_batch, minibatches, without_rejected
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import loss_inputs
from recipes.types import Group, Trajectory
from tests.helpers.trajectories import random_groups

CPU = torch.device("cpu")
GROUPS = random_groups(5, 4, vocab=9)


def test_advantages_follow_the_trajectories() -> None:
    batch = make_batch(GROUPS, preset("dr_grpo", 8), 8)
    expected = np.concatenate([g.rewards - g.rewards.mean() for g in GROUPS])
    for got, want, t in zip(batch.advantages, expected, batch.trajectories, strict=True):
        assert got.tolist() == pytest.approx([want] * len(t.response_ids))
    assert [t.reward for t in batch.trajectories] == [
        t.reward for g in GROUPS for t in g.trajectories
    ]


def test_a_failed_sample_neither_votes_nor_learns() -> None:
    """Rewards (1, failed, 0, 0): the mean is that of the three, and one sample compares nothing."""

    def sample(reward: float, failed: str = "") -> Trajectory:
        return dataclasses.replace(
            GROUPS[0].trajectories[0], reward=reward, correct=reward, failed=failed
        )

    rest = GROUPS[1]
    groups = [
        Group(
            problem=rest.problem,
            trajectories=(sample(1), sample(0, "time"), sample(0), sample(0)),
        ),
        Group(problem=rest.problem, trajectories=(sample(1), sample(0, "time"))),
        Group(problem=rest.problem, trajectories=(sample(0, "time"), sample(0, "time"))),
    ]
    batch = make_batch(groups, preset("dr_grpo", 8), 8)
    assert [a[0] for a in batch.advantages] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0.0])
    assert not any(t.failed for t in batch.trajectories)
    assert [group.mixed for group in groups] == [True, False, False]


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


def test_rejected_tokens_are_in_no_average() -> None:
    """One token of the first sequence and all of the second lie beyond the cap: the mean is over
    what is left, as if they had never been sampled."""
    algorithm = dataclasses.replace(
        preset("grpo", 8), is_level="token", is_mode="mask", loss_aggregation="token-mean"
    )
    batch = make_batch(GROUPS, algorithm, 8)
    old = [t.rollout_logprobs.copy() for t in batch.trajectories]
    old[0][0] += 5.0
    old[1] -= 5.0
    batch = dataclasses.replace(batch, old_logprobs=tuple(old))
    total = sum(len(array) for array in old)
    left = without_rejected(batch, algorithm, 8)
    assert left.kept is not None
    assert sum(int(kept.sum()) for kept in left.kept) == total - 1 - len(old[1])
    assert left.weights == pytest.approx(1 / (total - 1 - len(old[1])))
    by_sequence = dataclasses.replace(algorithm, loss_aggregation="seq-mean-token-mean")
    weights = without_rejected(batch, by_sequence, 8).weights
    lengths = [int(kept.sum()) for kept in left.kept]
    num = sum(length > 0 for length in lengths)
    assert lengths[:2] == [len(old[0]) - 1, 0] and num < len(old)
    assert weights[2] == pytest.approx(1 / (num * lengths[2]))
    assert (weights * lengths).sum() == pytest.approx(1.0)
    whole = dataclasses.replace(algorithm, is_mode="truncate")
    assert without_rejected(batch, whole, 8) is batch


def test_stale_sequences_are_compared_with_the_policy_that_sampled_them() -> None:
    """Their ratio starts at trainer / rollout, and the mismatch of engine and trainer is measured
    without them."""
    algorithm = preset("grpo", 8)
    versions = {span.version for g in GROUPS for t in g.trajectories for span in t.spans}
    batch = make_batch(GROUPS, algorithm, 8, version=max(versions, default=0))
    stale = np.zeros(len(batch.trajectories), dtype=bool)
    stale[:3] = True
    batch = dataclasses.replace(batch, stale=stale)
    lengths = [len(t.response_ids) for t in batch.trajectories]
    logprobs = torch.randn(sum(lengths), requires_grad=True)
    inputs = loss_inputs(batch, logprobs, torch.device("cpu"))
    cut = sum(lengths[:3])
    assert torch.equal(inputs.old[:cut], inputs.rollout[:cut])
    assert torch.equal(inputs.old[cut:], logprobs.detach()[cut:])
    metrics = TokenMetrics()
    metrics.add(inputs, policy_loss(inputs, algorithm), torch.zeros(sum(lengths)), 1)
    expected = (inputs.old - inputs.rollout)[cut:].abs().mean()
    named = metrics.result()
    assert named["sampling/sampling_logp_difference/mean"] == pytest.approx(float(expected))
    assert named["perf/stale_response_tokens"] == cut


def test_a_step_without_a_grade_is_a_batch_of_nothing() -> None:
    """As a service that is down for a step leaves it, under every option that looks at tokens."""
    failed = [
        dataclasses.replace(
            group,
            trajectories=tuple(
                dataclasses.replace(t, failed="http: 503") for t in group.trajectories
            ),
        )
        for group in GROUPS
    ]
    algorithm = dataclasses.replace(
        preset("reinforce++", 8), is_level="token", is_mode="mask", kl_coef=0.1, num_minibatches=2
    )
    batch = make_batch(failed, algorithm, 8, version=0, old=(), reference=())
    assert batch.trajectories == () and not batch.learns.any()
    assert minibatches(batch, algorithm, 8, seed=0) == []


def test_a_decoupled_batch_compares_stale_sequences_with_the_policy_before_the_update() -> None:
    algorithm = dataclasses.replace(preset("grpo", 8), decoupled=True)
    assert algorithm.needs_old_logprobs
    old = tuple(t.rollout_logprobs - 0.5 for group in GROUPS for t in group.trajectories)
    batch = make_batch(GROUPS, algorithm, 8, old=old)
    batch = dataclasses.replace(batch, stale=np.ones(len(old), dtype=bool))
    total = sum(map(len, old))
    inputs = loss_inputs(batch.select([0, 1]), torch.zeros(len(old[0]) + len(old[1])), CPU)
    assert inputs.old.tolist() == pytest.approx(np.concatenate(old[:2]).tolist())
    far = dataclasses.replace(algorithm, is_max_k3=0.05, loss_aggregation="token-mean")
    # k3 of a log weight of -.5 is .10653: all are out, unless as many nats are allowed.
    assert sum(map(np.sum, make_batch(GROUPS, far, 8, old=old).kept or ())) == 0
    near = dataclasses.replace(far, is_max_k3=0.11)
    assert sum(map(np.sum, make_batch(GROUPS, near, 8, old=old).kept or ())) == total
