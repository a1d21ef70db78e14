"""Rows as int8 in plain torch: the arithmetic that every other implementation equals."""

from __future__ import annotations

import torch

from kernels.norm import reference as norm


def quantize_rows(
    x: torch.Tensor,
    norm_weight_I: torch.Tensor | None,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.quant.rows.quantize_rows`."""
    if norm_weight_I is not None:
        x = norm.rms_norm(x, norm_weight_I, eps)
    wide = x.float()
    peak = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    # By a tensor of the device: a GPU multiplies by the reciprocal of a number of the host.
    scale = peak / torch.full_like(peak, 127.0)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    ratio = (wide / scale[..., None]).clamp_(-127.0, 127.0).round_()
    quantized = ratio.nan_to_num_(0.0).to(torch.int8)
    return (quantized, scale) if out is None else (out[0].copy_(quantized), out[1].copy_(scale))
