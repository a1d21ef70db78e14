"""How evenly tokens are spread over experts: what is logged, and the loss that evens them out.

Legend: T tokens, E experts, K experts of a token, L layers with experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

LoadArray = np.ndarray[Any, np.dtype[np.int64]]


def balance_loss(shares_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of f * P, a scalar: f is the share of the choices that an expert got,
    P the mean share that tokens asked of it, which alone has a gradient. 1 where both are even,
    up to E. Fedus et al., Switch Transformer, arXiv 2101.03961, equations 4 to 6, with the choices
    of all K slots counted together.

    shares_TE: float32, a token's sum is 1. ids_TK: int64.
    """
    num_experts = shares_TE.shape[1]
    share_E = load_of(ids_TK, num_experts) / ids_TK.numel()
    return num_experts * (share_E * shares_TE.mean(dim=0)).sum()


def load_of(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many of the choices each expert got, int64 [E]; the host does not wait for the device."""
    ids = ids_TK.flatten()
    return ids.new_zeros(num_experts).scatter_add_(0, ids, torch.ones_like(ids))


def load_entropy(load_LE: LoadArray) -> float:
    """Mean over layers of the entropy of the experts' shares of the choices, in nats: ln E where
    all are used alike, 0 where one takes everything."""
    shares_LE = load_LE / load_LE.sum(axis=1, keepdims=True).clip(min=1)
    logs_LE = np.log(np.where(shares_LE > 0, shares_LE, 1.0))
    return float(-(shares_LE * logs_LE).sum(axis=1).mean())


def max_violation(load_LE: LoadArray) -> float:
    """Mean over layers of how far the busiest expert is above the mean, over that mean: MaxVio of
    Wang et al., arXiv 2408.15664."""
    mean_L = load_LE.mean(axis=1).clip(min=1e-9)
    return float((load_LE.max(axis=1) / mean_L - 1.0).mean())
