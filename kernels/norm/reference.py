"""RMSNorm in plain torch. D: normalised width."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.norm.rms_norm`."""
    if x.dtype == torch.float32:
        # The fused op keeps the order of operations where there is nothing to round between
        # the two products; in 16 bits it would skip the rounding before the weight.
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total
