"""What every layer is told when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.config import KernelBackend
from engine.parallel.collectives import Collectives, NoCollectives
from engine.parallel.mesh import Mesh
from engine.quant.base import LinearMethod, Unquantized
from kernels.linear.plan import MAX_ROWS


@dataclass(frozen=True, kw_only=True)
class LayerRuntime:
    """Where a layer lives and how it computes.

    backend: implementation of the kernels the layer calls.
    mesh: which shard of each parameter this rank holds.
    collectives: how it reaches the ranks that hold the others; without, layers return what
        this rank has computed.
    linear: how linear layers store and apply their weights.
    """

    device: torch.device
    dtype: torch.dtype
    backend: KernelBackend
    mesh: Mesh = field(default_factory=Mesh)
    collectives: Collectives = field(default_factory=NoCollectives)
    linear: LinearMethod = field(default_factory=Unquantized)

    @property
    def few_rows(self) -> int:
        """Steps of up to this many tokens run through `LinearMethod.fused`, which carries the
        whole residual stream from layer to layer; 0 for none.

        One rank only: with more, a sum over ranks comes between a product and its residual.
        """
        return MAX_ROWS if self._fuses and self.mesh.tp_size == 1 else 0

    @property
    def few_rows_apart(self) -> int:
        """Products of up to this many rows run through `LinearMethod.fused` without a norm before
        or a residual behind them, which the sums over ranks have; 0 for none. Several ranks."""
        return MAX_ROWS if self._fuses and self.mesh.tp_size > 1 else 0

    @property
    def _fuses(self) -> bool:
        has_kernels = self.backend == "triton" and self.dtype.itemsize == 2
        return has_kernels and self.linear.fuses_few_rows
