"""The gated MLP of a decoder layer.

Legend: T tokens, E hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.activation import GatedActivation
from engine.layers.attention import StepContext
from engine.layers.kinds import DenseMLPKind
from engine.layers.linear import MergedLinear, RowLinear, gate_up_outputs
from engine.layers.norm import RMSNorm
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Summand


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one matrix. Of the step it asks nothing."""

    def __init__(self, hidden_size: int, kind: DenseMLPKind, *, runtime: LayerRuntime) -> None:
        super().__init__()
        size, bias = kind.intermediate_size, kind.bias
        outputs = gate_up_outputs(size, runtime.mesh, kind.size_key)
        self.gate_up_proj = MergedLinear(hidden_size, outputs, bias=bias, runtime=runtime)
        self.activation = GatedActivation(kind.activation, runtime.backend)
        self.down_proj = RowLinear(
            size, hidden_size, bias=bias, runtime=runtime, what=kind.size_key
        )
        self.fuses_few_rows = kind.activation == "silu"

    def forward(self, hidden_TE: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        """[T, E] -> [T, E], the sum over ranks."""
        return self.down_proj(self._hidden(hidden_TE))

    def summand(self, hidden_TE: torch.Tensor, context: StepContext | None = None) -> Summand:
        """forward(hidden), its sum over ranks left to the norm that follows."""
        return self.down_proj.summand(self._hidden(hidden_TE))

    def _hidden(self, hidden_TE: torch.Tensor) -> torch.Tensor:
        if self.fuses_few_rows and self.gate_up_proj.fusion.takes(hidden_TE):
            return self.gate_up_proj.gated(hidden_TE)
        return self.activation(self.gate_up_proj(hidden_TE))

    def add_to(
        self, total_TE: torch.Tensor, norm: RMSNorm, context: StepContext | None = None
    ) -> torch.Tensor:
        """`total + forward(norm(total))` for the few rows of `LayerRuntime.few_rows`, where
        `fuses_few_rows`: [T, E]."""
        return self.down_proj.add_to(total_TE, self.gate_up_proj.after(norm, total_TE, gated=True))
