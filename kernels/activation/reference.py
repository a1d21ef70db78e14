"""Gated activations in plain torch. T tokens, I intermediate width."""

from __future__ import annotations

import torch


def silu_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """See `kernels.activation.silu_mul`."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI).mul_(up_TI)


def gelu_tanh_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """See `kernels.activation.gelu_tanh_mul`."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate_TI, approximate="tanh").mul_(up_TI)
