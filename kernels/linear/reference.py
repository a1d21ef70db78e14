"""Products with their surroundings in plain torch. R rows, I inputs, O outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.activation import reference as activation
from kernels.linear.fusion import Options
from kernels.norm import reference as norm


def fused_linear(x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options) -> torch.Tensor:
    """See `kernels.linear.fused_linear`."""
    if options.norm_weight_I is not None:
        x_RI = norm.rms_norm(x_RI, options.norm_weight_I, options.eps)
    out_RO = F.linear(x_RI, weight_OI, options.bias_O)
    if options.gated:
        return activation.silu_mul(out_RO)
    return out_RO if options.residual_RO is None else options.residual_RO + out_RO
