"""Linear layers: column-sharded ones that merge several matrices, and row-sharded ones.

Legend: O output features, I input features of this rank; R rows; `...` any leading dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.layers.norm import RMSNorm
from engine.layers.parameter import (
    Part,
    Shard,
    ShardedParameter,
    even_shard,
    kv_head_shard,
    sliced,
    stacked,
    whole,
)
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Partial, Summand
from engine.parallel.mesh import Mesh
from kernels.linear import Options, new_counters


@dataclass(frozen=True)
class Output:
    """One of the matrices merged into a layer.

    name: its module name in the Hugging Face model ("q_proj").
    size: its output features; `shard`: those this rank holds.
    """

    name: str
    size: int
    shard: Shard


def qkv_outputs(num_heads: int, num_kv_heads: int, head_dim: int, mesh: Mesh) -> list[Output]:
    """Query, key and value projections of whole heads, KV heads repeated over ranks."""
    heads = even_shard(num_heads, mesh, "num_attention_heads")
    kv_heads = kv_head_shard(num_kv_heads, mesh)
    rows = Shard(heads.start * head_dim, heads.length * head_dim)
    kv_rows = Shard(kv_heads.start * head_dim, kv_heads.length * head_dim)
    return [
        Output("q_proj", num_heads * head_dim, rows),
        Output("k_proj", num_kv_heads * head_dim, kv_rows),
        Output("v_proj", num_kv_heads * head_dim, kv_rows),
    ]


def gate_up_outputs(
    intermediate_size: int, mesh: Mesh, what: str = "intermediate_size"
) -> list[Output]:
    """Gate and up projections of a gated MLP. what: names its size in errors."""
    shard = even_shard(intermediate_size, mesh, what)
    return [
        Output("gate_proj", intermediate_size, shard),
        Output("up_proj", intermediate_size, shard),
    ]


def _stack(outputs: Sequence[Output], trailing: tuple[int, ...]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    start = 0
    for output in outputs:
        shape = (output.size, *trailing)
        parts[output.name] = stacked(shape, 0, output.shard, start)
        start += output.shard.length
    return parts


class Fusion:
    """How one linear layer calls the fused products of few rows."""

    def __init__(self, runtime: LayerRuntime) -> None:
        self.backend = runtime.backend
        self.rows_apart = runtime.few_rows_apart
        has_few = max(runtime.few_rows, runtime.few_rows_apart) > 0
        self.counters = new_counters(runtime.device) if has_few else None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the product of x [R, I] alone is one of those; see
        `LayerRuntime.few_rows_apart`."""
        return 0 < len(x) <= self.rows_apart

    def options(
        self,
        bias_O: torch.Tensor | None,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual_RO: torch.Tensor | None = None,
    ) -> Options:
        """What surrounds the product; see `kernels.linear.Options`."""
        return Options(
            bias_O=bias_O,
            norm_weight_I=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            gated=gated,
            residual_RO=residual_RO,
            counters=self.counters,
        )


class MergedLinear(nn.Module):
    """Several matrices over one input, stacked along their outputs, which ranks divide."""

    def __init__(
        self, in_features: int, outputs: Sequence[Output], *, bias: bool, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        self.method = runtime.linear
        self.fusion = Fusion(runtime)
        self.sizes = [output.shard.length for output in outputs]
        rows = sum(self.sizes)
        self.weight = self.method.build(
            self,
            _stack(outputs, (in_features,)),
            (rows, in_features),
            dtype=runtime.dtype,
            device=runtime.device,
        )
        self.bias: ShardedParameter | None = None
        if bias:
            storage = torch.empty(rows, dtype=runtime.dtype, device=runtime.device)
            self.bias = ShardedParameter(storage, _stack(outputs, ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O], the merged outputs of this rank side by side."""
        if self.fusion.takes(x):
            options = self.fusion.options(self.bias)
            return self.method.fused(x, self.weight, options, backend=self.fusion.backend)
        return self.method.apply(x, self.weight, self.bias)

    def gated(self, x_RI: torch.Tensor) -> torch.Tensor:
        """x [R, I] that `Fusion.takes` -> silu(gate) * up of the halves of forward(x)."""
        options = self.fusion.options(self.bias, gated=True)
        return self.method.fused(x_RI, self.weight, options, backend=self.fusion.backend)

    def after(self, norm: RMSNorm, x_RI: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
        """Few rows x [R, I] -> forward(norm(x)) [R, O], or silu(gate) * up of its halves."""
        options = self.fusion.options(self.bias, norm=norm, gated=gated)
        return self.method.fused(x_RI, self.weight, options, backend=self.fusion.backend)


class RowLinear(nn.Module):
    """One matrix whose inputs the ranks divide; their summands add up to the output.

    Rank 0 alone adds the bias.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, runtime: LayerRuntime, what: str
    ) -> None:
        super().__init__()
        self.method = runtime.linear
        self.collectives = runtime.collectives
        self.is_divided = runtime.mesh.tp_size > 1
        self.fusion = Fusion(runtime)
        shard = even_shard(in_features, runtime.mesh, what)
        self.weight = self.method.build(
            self,
            sliced((out_features, in_features), 1, shard),
            (out_features, shard.length),
            dtype=runtime.dtype,
            device=runtime.device,
        )
        self.bias: ShardedParameter | None = None
        self.adds_bias = bias and runtime.mesh.tp_rank == 0
        if bias:
            storage = torch.empty(out_features, dtype=runtime.dtype, device=runtime.device)
            self.bias = ShardedParameter(storage, whole((out_features,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O], the sum over ranks."""
        return self.collectives.all_reduce(self._own(x))

    def summand(self, x: torch.Tensor) -> Summand:
        """forward(x), its sum over ranks left to the norm that follows."""
        own = self._own(x)
        return Partial(own, self.collectives) if self.is_divided else own

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.adds_bias else None
        if self.fusion.takes(x):
            options = self.fusion.options(bias)
            return self.method.fused(x, self.weight, options, backend=self.fusion.backend)
        return self.method.apply(x, self.weight, bias)

    def add_to(self, total_RO: torch.Tensor, x_RI: torch.Tensor) -> torch.Tensor:
        """Few rows x [R, I], on a rank that holds all inputs -> total + forward(x) [R, O]."""
        options = self.fusion.options(self.bias, residual_RO=total_RO)
        return self.method.fused(x_RI, self.weight, options, backend=self.fusion.backend)
