"""From groups to the batches of optimizer updates.

Legend: G groups, S samples of a group, N = G * S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from engine.protocol import FloatArray
from recipes.algorithms.advantages import advantages
from recipes.algorithms.aggregation import token_weights
from recipes.algorithms.importance import accepted
from recipes.algorithms.presets import Algorithm
from recipes.types import Batch, Group, Trajectory


def make_batch(
    groups: Sequence[Group],
    algorithm: Algorithm,
    max_new_tokens: int,
    *,
    version: int | None = None,
) -> Batch:
    """All graded trajectories with their advantages, and the weights of one update over all of
    them. Each token has the advantage of its reply.

    version: of the weights that learn; what others sampled is marked stale. None marks nothing.
    """
    trajectories = tuple(t for group in groups for t in group.graded)
    return Batch(
        trajectories=trajectories,
        advantages=_group_advantages(groups, algorithm),
        weights=_weights([len(t.response_ids) for t in trajectories], algorithm, max_new_tokens),
        stale=None if version is None else np.array([_is_stale(t, version) for t in trajectories]),
    )


def _group_advantages(groups: Sequence[Group], algorithm: Algorithm) -> tuple[FloatArray, ...]:
    """float32 [response_len] a graded trajectory. A group with fewer than two of them compares
    nothing: its advantage is zero."""
    arrays: list[FloatArray] = []
    for group in groups:
        if not group.graded:
            continue
        rewards_1S = torch.from_numpy(group.rewards)[None]
        advantages_S = advantages(rewards_1S, algorithm.advantage)[0].tolist()
        arrays += [
            np.full(len(trajectory.response_ids), advantage, dtype=np.float32)
            for trajectory, advantage in zip(group.graded, advantages_S, strict=True)
        ]
    return tuple(arrays)


def _is_stale(trajectory: Trajectory, version: int) -> bool:
    return any(span.version != version for span in trajectory.spans)


def without_rejected(batch: Batch, algorithm: Algorithm, max_new_tokens: int) -> Batch:
    """The batch with the tokens that the importance mask rejects taken out of the loss, and the
    weights of those that are left. Needs `old_logprobs`."""
    if not algorithm.rejects:
        return batch
    assert batch.old_logprobs is not None
    lengths = [len(t.response_ids) for t in batch.trajectories]
    kept_K = accepted(
        torch.from_numpy(np.concatenate(batch.old_logprobs)),
        torch.from_numpy(np.concatenate([t.rollout_logprobs for t in batch.trajectories])),
        torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        len(lengths),
        level=algorithm.is_level,
        cap=algorithm.is_cap,
    ).numpy()
    kept = tuple(np.split(kept_K, np.cumsum(lengths)[:-1]))
    batch = dataclasses.replace(batch, kept=kept)
    weights = _weights(_lengths(batch), algorithm, max_new_tokens)
    return dataclasses.replace(batch, weights=weights)


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
