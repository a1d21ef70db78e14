"""Self-attention of a decoder layer: projections, head norms, rotary; KV is the batch's.

Legend: T tokens, E hidden size, H query heads, K KV heads, D head dim, C columns of the fused
query, key and value projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.layers.kinds import AttentionKind
from engine.layers.linear import MergedLinear, Output, RowLinear, qkv_outputs
from engine.layers.norm import RMSNorm
from engine.layers.projection_norm import ProjectionNorm, ProjectionNorms
from engine.layers.rotary import AnyRotary
from engine.layers.route_sink import RouteSink
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Summand
from kernels.rotary import HeadNorms, KVTarget


class StepContext(Protocol):
    """What a forward pass needs to know of the batch it runs on."""

    @property
    def positions_T(self) -> torch.Tensor:
        """Position of each token in its sequence, int [T]."""
        ...

    @property
    def num_rows(self) -> torch.Tensor | None:
        """int32 [1] on the device: rows from there on only fill a graph. None: every row counts."""
        ...

    @property
    def routes(self) -> RouteSink | None:
        """What takes the experts of each row; None where nobody wants them."""
        ...

    def attend(self, layer_index: int, heads: ProjectedHeads) -> torch.Tensor:
        """Store the new keys and values of a layer, attend to each sequence as far as the layer's
        window reaches, its scores scaled as the model's are: [T, H, D]."""
        ...


class Attention(nn.Module):
    """Grouped-query self-attention. Whoever keeps the KV knows scale and window."""

    def __init__(
        self,
        layer_index: int,
        hidden_size: int,
        kind: AttentionKind,
        rotary: AnyRotary,
        *,
        runtime: LayerRuntime,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = kind.head_dim
        self.rotary = rotary
        outputs = qkv_outputs(kind.num_heads, kind.num_kv_heads, kind.head_dim, runtime.mesh)
        self.qkv_proj = MergedLinear(hidden_size, outputs, bias=kind.qkv_bias, runtime=runtime)
        self.o_proj = RowLinear(
            kind.num_heads * kind.head_dim,
            hidden_size,
            bias=kind.o_bias,
            runtime=runtime,
            what="num_attention_heads",
        )
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.head_norms: HeadNorms | None = None
        self._projection_norms: ProjectionNorms | None = None
        if kind.qk_norm == "head":
            self._add_head_norms(kind, runtime)
        elif kind.qk_norm == "projection":
            self._add_projection_norms(kind, outputs, runtime)

    def _add_head_norms(self, kind: AttentionKind, runtime: LayerRuntime) -> None:
        q_norm, k_norm = (RMSNorm(kind.head_dim, kind.norm, runtime=runtime) for _ in range(2))
        self.q_norm, self.k_norm = q_norm, k_norm
        self.head_norms = HeadNorms(
            q_norm.weight, k_norm.weight, kind.norm.eps, kind.norm.weighting
        )

    def _add_projection_norms(
        self, kind: AttentionKind, outputs: Sequence[Output], runtime: LayerRuntime
    ) -> None:
        q, k, _ = outputs
        kv_copies = max(runtime.mesh.tp_size // kind.num_kv_heads, 1)
        q_norm = ProjectionNorm(q.size, q.shard, 1, kind.norm, runtime=runtime)
        k_norm = ProjectionNorm(k.size, k.shard, kv_copies, kind.norm, runtime=runtime)
        self.q_norm, self.k_norm = q_norm, k_norm
        self._projection_norms = ProjectionNorms(q_norm, k_norm, runtime)

    def forward(self, hidden_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """[T, E] -> [T, E], the sum over ranks."""
        return self.o_proj(self._attend(self.qkv_proj(hidden_TE), context))

    def summand(self, hidden_TE: torch.Tensor, context: StepContext) -> Summand:
        """forward(hidden, context), its sum over ranks left to the norm that follows."""
        return self.o_proj.summand(self._attend(self.qkv_proj(hidden_TE), context))

    def add_to(self, total_TE: torch.Tensor, norm: RMSNorm, context: StepContext) -> torch.Tensor:
        """`total + forward(norm(total))` for the few rows of `LayerRuntime.few_rows`: [T, E]."""
        qkv_TC = self.qkv_proj.after(norm, total_TE)
        return self.o_proj.add_to(total_TE, self._attend(qkv_TC, context))

    def _attend(self, qkv_TC: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Fused projection [T, C] -> [T, H * D]."""
        if self._projection_norms is not None:
            self._projection_norms(qkv_TC)
        heads = ProjectedHeads(self, qkv_TC, context.positions_T)
        return context.attend(self.layer_index, heads).flatten(1)


@dataclass(frozen=True, eq=False)
class ProjectedHeads:
    """What a layer hands to whoever keeps the KV: the heads of its fused projection, whose
    norms and rotation are still to be done, so that the kernel that does them may write the KV.

    qkv_TC: [T, C]. positions_T: int [T].
    """

    layer: Attention
    qkv_TC: torch.Tensor
    positions_T: torch.Tensor

    def store(self, target: KVTarget) -> torch.Tensor:
        """Normalise and rotate the heads and write keys and values to their pages, in one kernel
        on a GPU. Returns the queries [T, H, D]."""
        layer = self.layer
        return layer.rotary.store(self.qkv_TC, self.positions_T, target, layer.head_norms)

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H, D], keys and values [T, K, D], normalised and rotated."""
        layer = self.layer
        parts = self.qkv_TC.split(layer.qkv_proj.sizes, dim=-1)
        q_THD, k_TKD, v_TKD = (part.unflatten(-1, (-1, layer.head_dim)) for part in parts)
        if layer.head_norms is not None:
            assert layer.q_norm is not None and layer.k_norm is not None
            q_THD, k_TKD = layer.q_norm(q_THD), layer.k_norm(k_TKD)
        return (*layer.rotary(q_THD, k_TKD, self.positions_T), v_TKD)
