"""The gated activation of an MLP."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import KernelBackend
from kernels.activation import silu_mul


class SiluMul(nn.Module):
    """silu(gate) * up of a merged gate-and-up projection (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, backend: KernelBackend) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2 * I] -> [T, I]."""
        return silu_mul(gate_up, backend=self.backend)
