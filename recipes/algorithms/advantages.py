"""Group advantages: how much better a sample is than its siblings.

Legend: G groups, S samples of a group.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

GroupEstimator = Literal["group_norm", "group_mean", "leave_one_out"]
AdvantageEstimator = Literal[
    "group_norm",
    "group_mean",
    "leave_one_out",
    "gae",
    "return_to_go",
    "greedy_baseline",
    "teacher",
]
"""The last four credit tokens: by the values of a critic (PPO; see `gae.gae`), by what is still to
come (REINFORCE++, arXiv 2501.03262), by that less the reward of the greedy reply (ReMax, arXiv
2310.10505), see `returns.returns_to_go`; and by what a teacher thinks of each (`distillation`)."""

GROUP_ESTIMATORS = frozenset(get_args(GroupEstimator))

STD_EPSILON = 1e-4


def group_norm(rewards_GS: torch.Tensor) -> torch.Tensor:
    """(reward - group mean) / (group std + 1e-4): GRPO, DeepSeekMath arXiv 2402.03300.

    rewards_GS: float [G, S]; the std is the unbiased one, zero for S = 1. Returns [G, S].
    """
    centred_GS = group_mean(rewards_GS)
    if rewards_GS.shape[1] == 1:
        return centred_GS
    return centred_GS / (rewards_GS.std(dim=1, keepdim=True) + STD_EPSILON)


def group_mean(rewards_GS: torch.Tensor) -> torch.Tensor:
    """reward - group mean, not divided by the std: Dr.GRPO, arXiv 2503.20783. [G, S] -> [G, S]."""
    return rewards_GS - rewards_GS.mean(dim=1, keepdim=True)


def leave_one_out(rewards_GS: torch.Tensor) -> torch.Tensor:
    """reward - mean of the other samples: RLOO, arXiv 2402.14740. [G, S] -> [G, S].

    With S = 1 there is no other sample, and the advantage is zero.
    """
    num_samples = rewards_GS.shape[1]
    if num_samples == 1:
        return torch.zeros_like(rewards_GS)
    return group_mean(rewards_GS) * (num_samples / (num_samples - 1))


def advantages(rewards_GS: torch.Tensor, estimator: AdvantageEstimator) -> torch.Tensor:
    """Advantage of each sample by the named estimator; float [G, S] -> [G, S].

    Raises ValueError for another name.
    """
    if estimator == "group_norm":
        return group_norm(rewards_GS)
    if estimator == "group_mean":
        return group_mean(rewards_GS)
    if estimator == "leave_one_out":
        return leave_one_out(rewards_GS)
    raise ValueError(f"unknown advantage estimator {estimator!r}")
