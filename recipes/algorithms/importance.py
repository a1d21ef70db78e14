"""Correction of the mismatch between the engine that sampled and the trainer that learns.

The trainer's probability of a token differs a little from the engine's (other kernels, other
dtype, newer weights). Weighting by trainer / rollout makes the gradient that of the trainer's
policy again; capping the weight bounds its variance.

Truncation: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training" (2025), TIS. Masking and the sequence level: J. Liu et al., "When Speed Kills
Stability" (2025), MIS.

Legend: K response tokens, N sequences.
"""

from __future__ import annotations

from typing import Literal

import torch

from recipes.algorithms.segments import segment_sum

ImportanceLevel = Literal["none", "token", "sequence"]
ImportanceMode = Literal["truncate", "mask"]

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped here so that a product over a long sequence stays finite."""


def log_ratio(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    level: ImportanceLevel,
) -> torch.Tensor:
    """log(trainer / rollout) of each token, or of its whole sequence; float32 [K], detached."""
    log_ratio_K = (old_K - rollout_K).detach()
    if level == "sequence":
        log_ratio_K = segment_sum(log_ratio_K, sequence_K, num_sequences)[sequence_K]
    return log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def accepted(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    *,
    level: ImportanceLevel,
    cap: float,
) -> torch.Tensor:
    """Tokens that mode "mask" keeps, bool [K].

    The others leave the loss before it is averaged (MIS): with their weight at zero but counted in
    the denominator (IcePop's convention), a batch that has drifted would learn more slowly only for
    having drifted. Arguments as in `importance_weights`.
    """
    return _within(log_ratio(old_K, rollout_K, sequence_K, num_sequences, level).exp(), cap)


def _within(ratio_K: torch.Tensor, cap: float) -> torch.Tensor:
    return (ratio_K <= cap) & (ratio_K >= 1 / cap)


def importance_weights(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    *,
    level: ImportanceLevel,
    mode: ImportanceMode,
    cap: float,
) -> torch.Tensor:
    """Weight of each token's loss, float32 [K], without gradient.

    old_K: log-probabilities of the trainer's policy when the batch was made.
    level: "none" gives ones; "token" one ratio a token; "sequence" their product.
    mode: "truncate" caps the ratio at `cap`; "mask" gives what lies outside [1/cap, cap] none; see
    `accepted` for what else becomes of those tokens. Raises ValueError for another mode.
    """
    if level == "none":
        return torch.ones_like(rollout_K)
    ratio_K = log_ratio(old_K, rollout_K, sequence_K, num_sequences, level).exp()
    if mode == "truncate":
        return ratio_K.clamp(max=cap)
    if mode == "mask":
        return torch.where(_within(ratio_K, cap), ratio_K, 0.0)
    raise ValueError(f"unknown importance mode {mode!r}")
