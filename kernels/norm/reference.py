"""RMSNorm in plain torch. D: normalised width."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.norm.rms_norm`."""
    # Step by step, not torch's rms_norm: on a CPU that decomposes into more passes than these,
    # and in 16 bits it would skip the rounding before the weight.
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total
