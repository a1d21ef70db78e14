"""Policy losses of the GRPO family on flat response tokens.

Legend: K response tokens of all sequences laid end to end, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipes.algorithms.importance import importance_weights
from recipes.algorithms.kl import kl
from recipes.algorithms.presets import Algorithm
from recipes.algorithms.segments import segment_mean

RATIO_CAP = 8.0
"""Largest ratio to the policy that sampled in the loss "dppo"."""
DPPO_KL = 1e-3
"""Weight of the squared log ratio there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """Tokens of one micro-batch; all float32 [K] but `sequence` (int64 [K], in [0, N)).

    logprobs: of the current policy, the only one with a gradient.
    old: of the policy before the first update on this data; of the one that sampled, where that
        is an older one.
    rollout: as the engine sampled them.
    reference: of the frozen reference model; None without a KL term.
    fresh: bool [K], tokens that the policy before the first update sampled; None for all.
    weights: weight of each token in the loss (`aggregation.token_weights`).
    """

    logprobs: torch.Tensor
    old: torch.Tensor
    rollout: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int
    reference: torch.Tensor | None = None
    fresh: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """loss: scalar with gradient. The rest float32 or bool [K], detached.

    clipped_low, clipped_high: tokens whose gradient the clipping removed, by side.
    importance: weights of the rollout correction. kl: estimate against the reference, or None.
    """

    loss: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    importance: torch.Tensor
    kl: torch.Tensor | None


def _clip_loss(
    log_ratio_K: torch.Tensor, advantages_K: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), the PPO surrogate (arXiv 1707.06347).

    DAPO's clip-higher (arXiv 2503.14476) is clip_high > clip_low. Returns [K].
    """
    ratio_K = log_ratio_K.exp()
    clipped_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_K * advantages_K, clipped_K * advantages_K)


def _sequence_log_ratio(
    log_ratio_K: torch.Tensor, sequence_K: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """GSPO's ratio (arXiv 2507.18071): the geometric mean over the sequence, on every token.

    The value is that of the sequence; the gradient reaches each token through its own
    log-probability (the paper's GSPO-token form, equal in gradient when the advantage of a
    sequence is one number). Returns [K].
    """
    mean_K = segment_mean(log_ratio_K.detach(), sequence_K, num_sequences)[sequence_K]
    return mean_K + log_ratio_K - log_ratio_K.detach()


def _cispo_loss(
    logprobs_K: torch.Tensor,
    log_ratio_K: torch.Tensor,
    advantages_K: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-sg(clip(r)) A log p: CISPO (MiniMax-M1, arXiv 2506.13585); no token loses its gradient.

    Returns [K].
    """
    ratio_K = log_ratio_K.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    return -ratio_K * advantages_K * logprobs_K


def _dppo_loss(inputs: LossInputs, clip_low: float, clip_high: float) -> torch.Tensor:
    """-min(r, RATIO_CAP) A + DPPO_KL log^2 r, with r against the policy that sampled.

    The first term is left out of tokens that `_moved_beyond` names (DPPO, arXiv 2602.04879); the
    cap is AIPO's (LlamaRL, arXiv 2505.24034). prime-rl trains by such a sum. Returns [K].
    """
    log_ratio_K = inputs.logprobs - inputs.rollout
    low_K, high_K = _moved_beyond(inputs, clip_low, clip_high)
    gain_K = log_ratio_K.exp().clamp(max=RATIO_CAP) * inputs.advantages
    return DPPO_KL * log_ratio_K.square() - torch.where(low_K | high_K, 0.0, gain_K)


def _moved_beyond(
    inputs: LossInputs, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose probability has gone down by more than `clip_low`, or up by more than
    `clip_high`, since they were sampled, the way their advantage points: a bound on the total
    variation, which one on the ratio is not. Two of bool [K]."""
    moved_K = inputs.logprobs.detach().exp() - inputs.rollout.exp()
    low_K = (moved_K < -clip_low) & (inputs.advantages < 0)
    return low_K, (moved_K > clip_high) & (inputs.advantages > 0)


def policy_loss(inputs: LossInputs, algorithm: Algorithm) -> LossOutput:
    """The loss of one micro-batch: weighted sum of token losses, plus KL where asked."""
    low, high = algorithm.clip_low, algorithm.clip_high
    log_ratio_K = inputs.logprobs - inputs.old.detach()
    if algorithm.policy_loss == "sequence_clip":
        log_ratio_K = _sequence_log_ratio(log_ratio_K, inputs.sequence, inputs.num_sequences)
    if algorithm.policy_loss == "cispo":
        token_loss_K = _cispo_loss(inputs.logprobs, log_ratio_K, inputs.advantages, low, high)
    elif algorithm.policy_loss == "dppo":
        token_loss_K = _dppo_loss(inputs, low, high)
    else:
        token_loss_K = _clip_loss(log_ratio_K, inputs.advantages, low, high)
    importance_K = importance_weights(
        inputs.old,
        inputs.rollout,
        inputs.sequence,
        inputs.num_sequences,
        level=algorithm.is_level,
        mode=algorithm.is_mode,
        cap=algorithm.is_cap,
        floor=algorithm.is_floor,
    )
    token_loss_K = token_loss_K * importance_K
    kl_K = None
    if inputs.reference is not None:
        kl_K = kl(inputs.logprobs, inputs.reference, algorithm.kl_estimator)
        token_loss_K = token_loss_K + algorithm.kl_coef * kl_K
    ratio_K = log_ratio_K.detach().exp()
    low_K = (ratio_K < 1 - low) & (inputs.advantages < 0)
    high_K = (ratio_K > 1 + high) & (inputs.advantages > 0)
    if algorithm.policy_loss == "dppo":
        low_K, high_K = _moved_beyond(inputs, low, high)
    return LossOutput(
        loss=(token_loss_K * inputs.weights).sum(),
        clipped_low=low_K,
        clipped_high=high_K,
        importance=importance_K,
        kl=None if kl_K is None else kl_K.detach(),
    )
