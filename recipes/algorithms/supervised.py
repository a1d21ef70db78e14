"""The loss of supervised fine-tuning."""

from __future__ import annotations

import torch

from recipes.algorithms.losses import LossInputs, LossOutput


def sft_loss(inputs: LossInputs) -> LossOutput:
    """Cross-entropy: the weighted sum of -log p of the tokens. Nothing is clipped or corrected;
    whatever `rollout` and `advantages` hold plays no part."""
    no_K = torch.zeros_like(inputs.weights, dtype=torch.bool)
    return LossOutput(
        loss=-(inputs.logprobs * inputs.weights).sum(),
        clipped_low=no_K,
        clipped_high=no_K,
        importance=torch.ones_like(inputs.weights),
        kl=None,
    )
