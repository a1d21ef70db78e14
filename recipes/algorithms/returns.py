"""Rewards of single tokens, and what is still to come after each.

Called by `collecting.batching.make_batch` for every sequence of a batch. Legend: K sampled tokens
of one sequence.
"""

from __future__ import annotations

import torch


def token_rewards(
    score: float, num_tokens: int, kl_K: torch.Tensor | None = None, kl_coef: float = 0.0
) -> torch.Tensor:
    """r_t = -kl_coef * kl_t, with the score of the reply added on its last token; float32 [K].

    The KL as a part of the reward: D. Ziegler et al., arXiv 1909.08593.
    kl_K: an estimate of KL(policy || reference) a token (`kl.kl`), float [K]; None is none.
    """
    rewards_K = torch.zeros(num_tokens) if kl_K is None else (-kl_coef * kl_K).float()
    rewards_K[-1] += score
    return rewards_K


def returns_to_go(rewards_K: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """R_t = r_t + gamma * R_(t+1), summed in float64; float [K] -> float32 [K]."""
    if gamma == 1.0:
        return rewards_K.double().flip(0).cumsum(0).flip(0).float()
    to_come, returns = 0.0, []
    for reward in reversed(rewards_K.tolist()):
        to_come = reward + gamma * to_come
        returns.append(to_come)
    return torch.tensor(returns[::-1], dtype=torch.float32)
