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
from recipes.algorithms.presets import Algorithm
from recipes.types import Batch, Group, Trajectory


def make_batch(groups: Sequence[Group], algorithm: Algorithm, max_new_tokens: int) -> Batch:
    """All trajectories with their advantages, and the weights of one update over all of them."""
    trajectories = tuple(t for group in groups for t in group.trajectories)
    rewards_GS = torch.from_numpy(np.stack([group.rewards for group in groups]))
    return Batch(
        trajectories=trajectories,
        advantages=advantages(rewards_GS, algorithm.advantage).reshape(-1).numpy(),
        weights=_weights(trajectories, algorithm, max_new_tokens),
    )


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
        weights = _weights(part.trajectories, algorithm, max_new_tokens)
        parts.append(dataclasses.replace(part, weights=weights))
    return parts


def _weights(
    trajectories: tuple[Trajectory, ...], algorithm: Algorithm, max_new_tokens: int
) -> FloatArray:
    lengths = [len(t.response_ids) for t in trajectories]
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
