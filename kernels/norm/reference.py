"""RMSNorm in plain torch. D: normalised width."""

from __future__ import annotations

import torch

from kernels.weighting import Weighting


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weighting: Weighting = "rounded"
) -> torch.Tensor:
    """See `kernels.norm.rms_norm`."""
    # Step by step, not torch's rms_norm: on a CPU that decomposes into more passes than these,
    # and in 16 bits it would skip the rounding before the weight.
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weighted(wide * scale, weight, weighting, x.dtype)


def weighted(
    normed: torch.Tensor, weight: torch.Tensor, weighting: Weighting, dtype: torch.dtype
) -> torch.Tensor:
    """Normalised values, float32 [..., D], times the weight [D], rounded to `dtype`."""
    if weighting == "rounded":
        return weight * normed.to(dtype)
    factor = 1.0 + weight.float() if weighting == "offset" else weight.float()
    return (normed * factor).to(dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weighting: Weighting = "rounded",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps, weighting), total
