"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438), token by token.

Legend: L tokens of one response.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.protocol import FloatArray

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


def gae(
    rewards_L: FloatArray,
    values_L: FloatArray,
    *,
    gamma: float,
    lam: float,
    sampled_L: BoolArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Advantages and returns of one response, both float32 [L].

    A_t = (r_t + gamma V_next - V_t) + gamma lam A_next, and R_t = A_t + V_t, where next is the
    next token that the policy sampled; nothing follows the last. The reward of a response stands
    on its last sampled token.

    rewards_L, values_L: float [L]; the value is of the state before the token. sampled_L: bool
    [L], the tokens that the policy drew; the others, such as a tool's, are passed over as if they
    were not there, and get 0 in both results. None says that all were sampled.
    """
    places = np.arange(len(values_L)) if sampled_L is None else np.flatnonzero(sampled_L)
    advantages_L = np.zeros(len(values_L), dtype=np.float64)
    returns_L = np.zeros(len(values_L), dtype=np.float64)
    next_value = next_advantage = 0.0
    for place in places[::-1].tolist():
        value = float(values_L[place])
        delta = float(rewards_L[place]) + gamma * next_value - value
        next_value, next_advantage = value, delta + gamma * lam * next_advantage
        advantages_L[place] = next_advantage
        returns_L[place] = next_advantage + value
    return advantages_L.astype(np.float32), returns_L.astype(np.float32)
