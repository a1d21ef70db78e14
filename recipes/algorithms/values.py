"""The loss of a critic, and how much of the returns it explains.

Legend: K response tokens of all sequences laid end to end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.protocol import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueInputs:
    """Tokens of one micro-batch; all float32 [K].

    values: of the current critic, the only one with a gradient. old: of the critic before the
    first update on this data. returns: what they are drawn to. weights: weight of each token in
    the loss (`aggregation.token_weights`).
    """

    values: torch.Tensor
    old: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueOutput:
    """loss: scalar with gradient. clipped: bool [K], tokens whose gradient the clipping removed."""

    loss: torch.Tensor
    clipped: torch.Tensor


def token_value_loss(
    values_K: torch.Tensor, old_K: torch.Tensor, returns_K: torch.Tensor, clip: float
) -> torch.Tensor:
    """max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2, float [K]: PPO's clipped value
    loss (arXiv 1707.06347; its reference implementation's form)."""
    near_K = torch.maximum(torch.minimum(values_K, old_K + clip), old_K - clip)
    return 0.5 * torch.maximum((values_K - returns_K).square(), (near_K - returns_K).square())


def value_loss(inputs: ValueInputs, clip: float) -> ValueOutput:
    """The weighted sum of the token losses."""
    loss_K = token_value_loss(inputs.values, inputs.old, inputs.returns, clip)
    away_K = inputs.values.detach()
    clipped_K = loss_K.detach() > 0.5 * (away_K - inputs.returns).square()
    return ValueOutput(loss=(loss_K * inputs.weights).sum(), clipped=clipped_K)


def explained_variance(values_K: FloatArray, returns_K: FloatArray) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one; 0
    where the returns do not vary."""
    spread = float(np.var(returns_K.astype(np.float64)))
    if spread == 0.0:
        return 0.0
    left = returns_K.astype(np.float64) - values_K.astype(np.float64)
    return 1.0 - float(np.var(left)) / spread
