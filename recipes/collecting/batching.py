"""From groups to the batches of optimizer updates.

Legend: G groups, S samples of a group, N = G * S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from engine.protocol import FloatArray
from recipes.algorithms.aggregation import token_weights
from recipes.algorithms.distillation import distillation_advantages
from recipes.algorithms.importance import accepted, near
from recipes.algorithms.normalise import Moments
from recipes.algorithms.presets import Algorithm
from recipes.collecting.credit import by_critic, estimated, graded, rewards_by_token, whitened
from recipes.types import Batch, BoolArray, Group, Trajectory

PerToken = tuple[FloatArray, ...]


def make_batch(
    groups: Sequence[Group],
    algorithm: Algorithm,
    max_new_tokens: int,
    *,
    version: int | None = None,
    old: PerToken | None = None,
    reference: PerToken | None = None,
    moments: Moments | None = None,
    teacher: PerToken | None = None,
    values: PerToken | None = None,
) -> Batch:
    """All graded trajectories with their advantages, and the weights of one update over all of
    them.

    version: of the weights that learn; what others sampled is marked stale. None marks nothing.
    old, reference: log-probabilities of those trajectories (`credit.graded`) under the weights that
        learn and under the reference, where the algorithm needs them. moments: of the rewards,
        where they are normalised. teacher: as `old`, under the teacher, where there is one. values:
        by a critic, of the state before each token.
    """
    trajectories = graded(groups)
    rewards = rewards_by_token(
        trajectories, algorithm, old=old, reference=reference, moments=moments
    )
    returns = None
    if values is not None:
        advantages, returns = by_critic(rewards, values, algorithm)
    elif algorithm.distils:
        advantages = _taught(trajectories, teacher)
    else:
        advantages = estimated(groups, rewards, algorithm, moments)
    batch = Batch(
        trajectories=trajectories,
        advantages=advantages,
        weights=_weights([len(t.response_ids) for t in trajectories], algorithm, max_new_tokens),
        old_logprobs=old,
        reference_logprobs=reference if algorithm.kl_in == "loss" else None,
        stale=None if version is None else np.array([_is_stale(t, version) for t in trajectories]),
        decoupled=algorithm.decoupled,
        token_rewards=rewards,
        values=values,
        returns=returns,
    )
    batch = without_rejected(batch, algorithm, max_new_tokens)
    return whitened(batch, groups, algorithm)


def _taught(trajectories: Sequence[Trajectory], teacher: PerToken | None) -> tuple[FloatArray, ...]:
    assert teacher is not None
    return distillation_advantages(teacher, [t.rollout_logprobs for t in trajectories])


def _is_stale(trajectory: Trajectory, version: int) -> bool:
    return any(span.version != version for span in trajectory.spans)


def without_rejected(batch: Batch, algorithm: Algorithm, max_new_tokens: int) -> Batch:
    """The batch with the tokens that the importance mask rejects taken out of the loss, and the
    weights of those that are left. Without `old_logprobs` nothing is known to be rejected, and
    nothing is where no reply was graded."""
    if not algorithm.rejects or not batch.old_logprobs:
        return batch
    lengths = [len(t.response_ids) for t in batch.trajectories]
    kept_K = _kept(batch.old_logprobs, batch.trajectories, algorithm)
    kept = tuple(np.split(kept_K, np.cumsum(lengths)[:-1]))
    batch = dataclasses.replace(batch, kept=kept)
    weights = _weights(_lengths(batch), algorithm, max_new_tokens)
    return dataclasses.replace(batch, weights=weights)


def _kept(old: PerToken, trajectories: Sequence[Trajectory], algorithm: Algorithm) -> BoolArray:
    """bool, of all response tokens end to end: those that no bound of the algorithm rejects."""
    lengths = [len(t.response_ids) for t in trajectories]
    told = (
        torch.from_numpy(np.concatenate(old)),
        torch.from_numpy(np.concatenate([t.rollout_logprobs for t in trajectories])),
        torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        len(lengths),
    )
    kept_K = torch.ones(sum(lengths), dtype=torch.bool)
    if algorithm.is_level != "none" and algorithm.is_mode == "mask":
        kept_K &= accepted(
            *told, level=algorithm.is_level, cap=algorithm.is_cap, floor=algorithm.is_floor
        )
    if algorithm.is_max_k3 is not None:
        kept_K &= near(*told, max_k3=algorithm.is_max_k3)
    kept: BoolArray = kept_K.numpy()
    return kept


def minibatches(
    batch: Batch, algorithm: Algorithm, max_new_tokens: int, *, seed: int
) -> list[Batch]:
    """The updates of one epoch: one, or the groups shuffled and dealt into several."""
    num = algorithm.num_minibatches
    if num == 1:
        return [batch]
    groups = _group_indices(batch)
    order = np.random.default_rng(seed).permutation(len(groups))
    parts = []
    for deal in np.array_split(order, num):
        chosen = [index for group in sorted(deal.tolist()) for index in groups[group]]
        if not chosen:
            continue
        part = batch.select(chosen)
        weights = _weights(_lengths(part), algorithm, max_new_tokens)
        parts.append(dataclasses.replace(part, weights=weights))
    return parts


def _lengths(batch: Batch) -> list[int]:
    """Tokens of each sequence that take part in the loss."""
    if batch.kept is not None:
        return [int(kept.sum()) for kept in batch.kept]
    return [len(t.response_ids) for t in batch.trajectories]


def _weights(lengths: list[int], algorithm: Algorithm, max_new_tokens: int) -> FloatArray:
    return token_weights(lengths, algorithm.loss_aggregation, max_new_tokens)


def _group_indices(batch: Batch) -> list[list[int]]:
    """Indices of each group's sequences: neighbours with the same prompt array."""
    groups: list[list[int]] = []
    for index, trajectory in enumerate(batch.trajectories):
        previous = batch.trajectories[index - 1] if index else None
        if previous is not None and previous.prompt_ids is trajectory.prompt_ids:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
