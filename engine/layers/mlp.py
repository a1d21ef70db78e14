"""The gated MLP of a decoder layer.

Legend: T tokens, E hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.activation import SiluMul
from engine.layers.linear import MergedLinear, RowLinear, gate_up_outputs
from engine.layers.norm import RMSNorm
from engine.layers.runtime import LayerRuntime


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        outputs = gate_up_outputs(intermediate_size, runtime.mesh)
        self.gate_up_proj = MergedLinear(hidden_size, outputs, bias=bias, runtime=runtime)
        self.act = SiluMul(runtime.backend)
        self.down_proj = RowLinear(
            intermediate_size, hidden_size, bias=bias, runtime=runtime, what="intermediate_size"
        )

    def forward(self, hidden_TE: torch.Tensor) -> torch.Tensor:
        """[T, E] -> [T, E], the sum over ranks."""
        return self.down_proj(self.act(self.gate_up_proj(hidden_TE)))

    def add_to(self, total_TE: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`total + forward(norm(total))` for the few rows of `LayerRuntime.few_rows`: [T, E]."""
        return self.down_proj.add_to(total_TE, self.gate_up_proj.after(norm, total_TE, gated=True))
