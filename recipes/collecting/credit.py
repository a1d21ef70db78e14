"""What each token of a reply has earned, and how much better that is than what was to be expected.

Called by `batching.make_batch`. Legend: G groups, S samples of a group, N sequences, K response
tokens of all of them end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from engine.protocol import FloatArray
from recipes.algorithms.advantages import advantages
from recipes.algorithms.gae import gae
from recipes.algorithms.kl import kl
from recipes.algorithms.normalise import Moments, whiten
from recipes.algorithms.presets import Algorithm
from recipes.algorithms.returns import returns_to_go, token_rewards
from recipes.types import Batch, Group, Trajectory


def graded(groups: Sequence[Group]) -> tuple[Trajectory, ...]:
    """The samples of all groups that have a reward, in order: the sequences of a batch."""
    return tuple(trajectory for group in groups for trajectory in group.graded)


def rewards_by_token(
    trajectories: Sequence[Trajectory],
    algorithm: Algorithm,
    *,
    old: Sequence[FloatArray] | None = None,
    reference: Sequence[FloatArray] | None = None,
    moments: Moments | None = None,
) -> tuple[FloatArray, ...]:
    """N arrays float32 [response_len], see `Batch.token_rewards`.

    old, reference: log-probabilities of the policy before the update and of the reference; both
        are needed for a KL in the reward. moments: of the rewards, where they are normalised.
    """
    arrays: list[FloatArray] = []
    for index, trajectory in enumerate(trajectories):
        kl_K = None
        if algorithm.rewards_kl:
            assert old is not None and reference is not None
            kl_K = token_kl(old[index], reference[index], algorithm)
        rewards_K = token_rewards(
            _scored(trajectory, moments),
            len(trajectory.response_ids),
            kl_K,
            algorithm.kl_coef,
        )
        arrays.append(rewards_K.numpy())
    return tuple(arrays)


def token_kl(old_K: FloatArray, reference_K: FloatArray, algorithm: Algorithm) -> torch.Tensor:
    """The algorithm's estimate of KL(policy || reference) on each token; float32 [K]."""
    return kl(torch.from_numpy(old_K), torch.from_numpy(reference_K), algorithm.kl_estimator)


def _scored(trajectory: Trajectory, moments: Moments | None) -> float:
    return trajectory.reward if moments is None else moments.normalised(trajectory.reward)


def estimated(
    groups: Sequence[Group],
    token_rewards: Sequence[FloatArray],
    algorithm: Algorithm,
    moments: Moments | None = None,
) -> tuple[FloatArray, ...]:
    """Advantages by the algorithm's estimator, not whitened: N arrays float32 [response_len].

    token_rewards: of `rewards_by_token`, for the graded samples of the groups in order. A group
    that `is_comparable` does not say anything of has the advantage 0.
    """
    arrays: list[FloatArray] = []
    start = 0
    for group in groups:
        num = len(group.graded)
        returns = [
            returns_to_go(torch.from_numpy(array), algorithm.gamma)
            for array in token_rewards[start : start + num]
        ]
        start += num
        if not returns or not is_comparable(group, algorithm):
            arrays += [np.zeros(len(returns_K), dtype=np.float32) for returns_K in returns]
        elif algorithm.advantage == "return_to_go":
            arrays += [returns_K.numpy() for returns_K in returns]
        elif algorithm.advantage == "greedy_baseline":
            assert group.greedy is not None
            baseline = _scored(group.greedy, moments)
            arrays += [(returns_K - baseline).numpy() for returns_K in returns]
        else:
            arrays += _by_group(returns, algorithm)
    return tuple(arrays)


def by_critic(
    token_rewards: Sequence[FloatArray], values: Sequence[FloatArray], algorithm: Algorithm
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    """Advantages, not whitened, and returns by a critic's values: N arrays float32 [response_len]
    each (`gae.gae`)."""
    pairs = [
        gae(rewards_L, values_L, gamma=algorithm.gamma, lam=algorithm.gae_lambda)
        for rewards_L, values_L in zip(token_rewards, values, strict=True)
    ]
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def _by_group(returns: Sequence[torch.Tensor], algorithm: Algorithm) -> list[FloatArray]:
    """One advantage a sample, from what each of a group earned as a whole."""
    earned_1S = torch.stack([returns_K[0] for returns_K in returns])[None]
    advantages_S = advantages(earned_1S, algorithm.advantage)[0].tolist()
    return [
        np.full(len(returns_K), advantage, dtype=np.float32)
        for returns_K, advantage in zip(returns, advantages_S, strict=True)
    ]


def is_comparable(group: Group, algorithm: Algorithm) -> bool:
    """Whether the group has what its rewards are compared with: two of them, or the reward of the
    greedy reply; an estimator that does not compare within the group needs nothing."""
    if algorithm.advantage == "greedy_baseline":
        return group.greedy is not None and not group.greedy.failed
    return len(group.graded) > 1 or not algorithm.compares_group


def whitened(batch: Batch, groups: Sequence[Group], algorithm: Algorithm) -> Batch:
    """The batch with its advantages at mean 0 and deviation 1 over the tokens that take part in
    the loss, where the algorithm asks for it. Groups that are not comparable have no part."""
    if not algorithm.whiten_advantages or not batch.trajectories:
        return batch
    lengths_N = [len(array) for array in batch.advantages]
    told_N = [is_comparable(group, algorithm) for group in groups for _ in group.graded]
    counted_K = np.repeat(told_N, lengths_N)
    if batch.kept is not None:
        counted_K = counted_K & np.concatenate(batch.kept)
    values_K = whiten(
        torch.from_numpy(np.concatenate(batch.advantages)), torch.from_numpy(counted_K)
    ).numpy()
    return dataclasses.replace(
        batch, advantages=tuple(np.split(values_K, np.cumsum(lengths_N)[:-1]))
    )
