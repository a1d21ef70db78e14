"""silu(gate) * up in plain torch. T tokens, I intermediate width."""

from __future__ import annotations

import torch


def silu_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """See `kernels.activation.silu_mul`."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI).mul_(up_TI)
