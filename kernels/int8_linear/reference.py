"""Products of int8 in plain torch. R rows, I inputs, O outputs."""

from __future__ import annotations

import torch

from kernels.activation import reference as activation
from kernels.linear.fusion import Options
from kernels.quant.rows.reference import quantize_rows

_EXACT = 1024
"""Products of two int8 of at most 127 whose sum float32 holds exactly, in whatever order."""


def int8_linear(
    x_RI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, options: Options
) -> torch.Tensor:
    """See `kernels.int8_linear.int8_linear`."""
    quantized_RI, scale_R = quantize_rows(x_RI, options.norm_weight_I, options.eps)
    sums_RO = integer_product(quantized_RI, weight_OI)
    out_RO = sums_RO.float() * scale_R[:, None] * scale_O
    if options.bias_O is not None:
        out_RO = out_RO + options.bias_O.float()
    out_RO = out_RO.to(x_RI.dtype)
    if options.gated:
        return activation.silu_mul(out_RO)
    return out_RO if options.residual_RO is None else options.residual_RO + out_RO


def integer_product(x_RI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """int8 [R, I] @ int8 [O, I].T -> int32 [R, O], exact.

    By float products of pieces that cannot round: those of int8 saturate or not by processor, or
    are not there.
    """
    total_RO = torch.zeros(len(x_RI), len(weight_OI), dtype=torch.int32, device=x_RI.device)
    for start in range(0, x_RI.shape[1], _EXACT):
        columns = slice(start, start + _EXACT)
        x_RC, weight_OC = x_RI[:, columns].float(), weight_OI[:, columns].float()
        total_RO += (x_RC @ weight_OC.T).to(torch.int32)
    return total_RO
