"""Self-attention of a decoder layer: projections, head norms, rotary; KV is the batch's.

Legend: T tokens, E hidden size, H query heads, K KV heads, D head dim, C columns of the fused
query, key and value projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.layers.linear import MergedLinear, RowLinear, qkv_outputs
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotary
from engine.layers.runtime import LayerRuntime
from kernels.rotary import HeadNorms, KVTarget


class StepContext(Protocol):
    """What a forward pass needs to know of the batch it runs on."""

    @property
    def positions_T(self) -> torch.Tensor:
        """Position of each token in its sequence, int [T]."""
        ...

    def attend(
        self, layer_index: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Store the new keys and values of a layer, attend to all of each sequence: [T, H, D].

        Scores are scaled by D ** -0.5.
        """
        ...

    def kv_target(self, layer_index: int) -> KVTarget | None:
        """Where the new keys and values of a layer may be written by someone else, who then
        calls `attend_stored` in place of `attend`; None if nowhere."""
        ...

    def attend_stored(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """`attend`, the new keys and values being in `kv_target` already."""
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and options of the attention of one model.

    norm_eps: epsilon of the per-head norms of queries and keys; None for no such norms.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    norm_eps: float | None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(
        self, layer_index: int, shape: AttentionShape, rotary: Rotary, *, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = shape.head_dim
        self.rotary = rotary
        outputs = qkv_outputs(shape.num_heads, shape.num_kv_heads, shape.head_dim, runtime.mesh)
        self.qkv_proj = MergedLinear(
            shape.hidden_size, outputs, bias=shape.qkv_bias, runtime=runtime
        )
        self.o_proj = RowLinear(
            shape.num_heads * shape.head_dim,
            shape.hidden_size,
            bias=shape.o_bias,
            runtime=runtime,
            what="num_attention_heads",
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if shape.norm_eps is not None:
            self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps, runtime=runtime)
            self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps, runtime=runtime)

    def forward(self, hidden_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """[T, E] -> [T, E], the sum over ranks."""
        return self.o_proj(self._attend(self.qkv_proj(hidden_TE), context))

    def add_to(self, total_TE: torch.Tensor, norm: RMSNorm, context: StepContext) -> torch.Tensor:
        """`total + forward(norm(total))` for the few rows of `LayerRuntime.few_rows`: [T, E]."""
        qkv_TC = self.qkv_proj.after(norm, total_TE)
        return self.o_proj.add_to(total_TE, self._attend(qkv_TC, context))

    def _attend(self, qkv_TC: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Fused projection [T, C] -> [T, H * D]."""
        target = context.kv_target(self.layer_index)
        if target is not None:
            q_THD = self.rotary.store(qkv_TC, context.positions_T, target, self._head_norms())
            return context.attend_stored(self.layer_index, q_THD).flatten(1)
        parts = qkv_TC.split(self.qkv_proj.sizes, dim=-1)
        q_THD, k_TKD, v_TKD = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        q_THD, k_TKD = self.rotary(q_THD, k_TKD, context.positions_T)
        return context.attend(self.layer_index, q_THD, k_TKD, v_TKD).flatten(1)

    def _head_norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
