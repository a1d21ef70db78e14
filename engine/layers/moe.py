"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) in place of a layer's MLP.

Legend: T tokens, N experts, H hidden size.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.attention import StepContext
from engine.layers.experts import Experts
from engine.layers.kinds import MoeKind, SharedExpertKind
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.parameter import ShardedParameter, whole
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Partial, Summand
from engine.layers.summand import whole as whole_summand
from kernels.moe import Routed, norm_and_route, route


class Router(nn.Module):
    """Which experts a token goes to: the same on every rank, which holds all of `weight` [N, H].

    `e_score_correction_bias`, where there is one, is float32 [N] whatever dtype the model is served
    in: the choice hangs on differences that 16 bits do not tell.
    """

    def __init__(self, hidden_size: int, kind: MoeKind, *, runtime: LayerRuntime) -> None:
        super().__init__()
        self.rule = kind.routing
        self.backend = runtime.backend
        num = kind.routing.num_experts
        storage = torch.empty(num, hidden_size, dtype=runtime.dtype, device=runtime.device)
        self.weight = ShardedParameter(storage, whole((num, hidden_size)))
        self.e_score_correction_bias: ShardedParameter | None = None
        if kind.chosen_by_bias:
            bias_N = torch.empty(num, dtype=torch.float32, device=runtime.device)
            self.e_score_correction_bias = ShardedParameter(bias_N, whole((num,)))

    def forward(self, x_TH: torch.Tensor, num_rows: torch.Tensor | None) -> Routed:
        """The experts of every token; num_rows: as of `StepContext`."""
        return route(
            x_TH,
            self.weight,
            self.rule,
            bias_N=self.e_score_correction_bias,
            num_rows=num_rows,
            backend=self.backend,
        )

    def after(
        self, norm: RMSNorm, total_TH: torch.Tensor, num_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, Routed]:
        """`norm(total)` of few rows, [T, H], and the experts of its rows."""
        return norm_and_route(
            total_TH,
            norm.weight,
            norm.eps,
            self.weight,
            self.rule,
            bias_N=self.e_score_correction_bias,
            num_rows=num_rows,
            backend=self.backend,
        )


class _TokenGate(nn.Module):
    """The sigmoid of one number a token."""

    def __init__(self, hidden_size: int, *, runtime: LayerRuntime) -> None:
        super().__init__()
        storage = torch.empty(1, hidden_size, dtype=runtime.dtype, device=runtime.device)
        self.weight = ShardedParameter(storage, whole((1, hidden_size)))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, 1]."""
        return F.linear(x_TH, self.weight).sigmoid()


class MoeBlock(nn.Module):
    """Router, experts, and the expert that every token goes through, if the family has one.

    disk_name: what checkpoints call the block.
    """

    fuses_few_rows = True

    def __init__(
        self, layer_index: int, hidden_size: int, kind: MoeKind, *, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.disk_name = kind.names.block
        self.collectives = runtime.collectives
        self.is_divided = runtime.mesh.tp_size > 1
        self.gate = Router(hidden_size, kind, runtime=runtime)
        self.experts = Experts(hidden_size, kind, runtime=runtime)
        self._shared_kind = kind.shared
        if kind.shared is not None:
            self._add_shared(hidden_size, kind.shared, runtime)

    def _add_shared(self, hidden_size: int, kind: SharedExpertKind, runtime: LayerRuntime) -> None:
        self.add_module(kind.name, GatedMLP(hidden_size, kind.mlp, runtime=runtime))
        if kind.gated:
            self.add_module(f"{kind.name}_gate", _TokenGate(hidden_size, runtime=runtime))

    def forward(self, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """[T, H] -> [T, H], the sum over ranks."""
        return whole_summand(self.summand(x_TH, context))

    def summand(self, x_TH: torch.Tensor, context: StepContext) -> Summand:
        """forward(x, context), its sum over ranks left to the norm that follows: one sum for the
        experts and the shared one."""
        routed: Routed = self.gate(x_TH, context.num_rows)
        self._tell(routed, context)
        own_TH = self.experts(x_TH, routed, added_TH=self._shared(x_TH))
        return Partial(own_TH, self.collectives) if self.is_divided else own_TH

    def add_to(self, total_TH: torch.Tensor, norm: RMSNorm, context: StepContext) -> torch.Tensor:
        """`total + forward(norm(total))` for the few rows of `LayerRuntime.few_rows`: [T, H]."""
        x_TH, routed = self.gate.after(norm, total_TH, context.num_rows)
        self._tell(routed, context)
        added_TH = self._shared(x_TH)
        out_TH: torch.Tensor = self.experts(x_TH, routed, added_TH=added_TH, residual_TH=total_TH)
        return out_TH

    def _tell(self, routed: Routed, context: StepContext) -> None:
        if context.routes is not None:
            context.routes.take(self.layer_index, routed.ids_TK)

    def _shared(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        """This rank's part of the shared expert's output."""
        kind = self._shared_kind
        if kind is None:
            return None
        summand = cast(GatedMLP, self.get_submodule(kind.name)).summand(x_TH)
        own_TH = summand.own_TE if isinstance(summand, Partial) else summand
        if kind.gated:
            own_TH = self.get_submodule(f"{kind.name}_gate")(x_TH) * own_TH
        return own_TH
