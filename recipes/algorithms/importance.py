"""Correction of the mismatch between the engine that sampled and the trainer that learns.

The trainer's probability of a token differs a little from the engine's (other kernels, other
dtype, newer weights). Weighting by trainer / rollout makes the gradient that of the trainer's
policy again; capping the weight bounds its variance.

Truncation: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training" (2025), TIS. Masking, the sequence level and the geometric mean: J. Liu et al., "When
Speed Kills Stability" (2025), MIS. Weights of zero that are counted: IcePop (Ring-1T, arXiv
2510.18855), and AReaL's cap of the behaviour weight (arXiv 2505.24298).

Legend: K response tokens, N sequences.
"""

from __future__ import annotations

from typing import Literal

import torch

from recipes.algorithms.kl import k3
from recipes.algorithms.segments import segment_mean, segment_sum

ImportanceLevel = Literal["none", "token", "sequence", "geometric"]
ImportanceMode = Literal["truncate", "mask", "zero"]

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped here so that a product over a long sequence stays finite."""


def log_ratio(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    level: ImportanceLevel,
) -> torch.Tensor:
    """log(trainer / rollout) of each token, of its whole sequence, or the mean of its sequence's
    tokens ("geometric"); float32 [K], detached."""
    log_ratio_K = (old_K - rollout_K).detach()
    if level == "sequence":
        log_ratio_K = segment_sum(log_ratio_K, sequence_K, num_sequences)[sequence_K]
    elif level == "geometric":
        log_ratio_K = segment_mean(log_ratio_K, sequence_K, num_sequences)[sequence_K]
    return log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def accepted(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    *,
    level: ImportanceLevel,
    cap: float,
    floor: float | None = None,
) -> torch.Tensor:
    """Tokens that mode "mask" keeps, bool [K].

    The others leave the loss before it is averaged (MIS): with their weight at zero but counted in
    the denominator (mode "zero"), a batch that has drifted would learn more slowly only for having
    drifted. Arguments as in `importance_weights`.
    """
    ratio_K = log_ratio(old_K, rollout_K, sequence_K, num_sequences, level).exp()
    return _within(ratio_K, 1 / cap if floor is None else floor, cap)


def near(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    *,
    max_k3: float,
) -> torch.Tensor:
    """Tokens of sequences whose KL(rollout || trainer), estimated by the mean of k3 over their
    tokens, is at most `max_k3`; bool [K]. Arguments as in `importance_weights`."""
    ratio_K = log_ratio(old_K, rollout_K, sequence_K, num_sequences, "token")
    k3_K = k3(torch.zeros_like(ratio_K), ratio_K)
    return (segment_mean(k3_K, sequence_K, num_sequences) <= max_k3)[sequence_K]


def _within(ratio_K: torch.Tensor, floor: float, cap: float) -> torch.Tensor:
    return (ratio_K <= cap) & (ratio_K >= floor)


def importance_weights(
    old_K: torch.Tensor,
    rollout_K: torch.Tensor,
    sequence_K: torch.Tensor,
    num_sequences: int,
    *,
    level: ImportanceLevel,
    mode: ImportanceMode,
    cap: float,
    floor: float | None = None,
) -> torch.Tensor:
    """Weight of each token's loss, float32 [K], without gradient.

    old_K: log-probabilities of the trainer's policy when the batch was made.
    level: "none" gives ones; "token" one ratio a token; "sequence" their product; "geometric" their
    geometric mean.
    mode: "truncate" caps the ratio at `cap`; "mask" and "zero" give what lies outside [floor, cap]
    none; see `accepted` for what else becomes of those tokens in "mask". floor: None is 1/cap in
    "mask", and 0 in "zero". Raises ValueError for another mode.
    """
    if level == "none":
        return torch.ones_like(rollout_K)
    ratio_K = log_ratio(old_K, rollout_K, sequence_K, num_sequences, level).exp()
    if mode == "truncate":
        return ratio_K.clamp(max=cap)
    if mode in ("mask", "zero"):
        least = floor if floor is not None else 1 / cap if mode == "mask" else 0.0
        return torch.where(_within(ratio_K, least, cap), ratio_K, 0.0)
    raise ValueError(f"unknown importance mode {mode!r}")
