"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.kinds import NormKind
from engine.layers.parameter import ShardedParameter, whole
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Partial, Summand
from kernels.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Scale the last dim to unit root mean square, times a weight that every rank holds."""

    def __init__(self, size: int, kind: NormKind, *, runtime: LayerRuntime) -> None:
        super().__init__()
        self.eps = kind.eps
        self.weighting = kind.weighting
        self.backend = runtime.backend
        storage = torch.empty(size, dtype=runtime.dtype, device=runtime.device)
        self.weight = ShardedParameter(storage, whole((size,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps, weighting=self.weighting, backend=self.backend)

    def add(self, x: Summand, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise `x + residual`; return (normed, x + residual)."""
        if isinstance(x, Partial):
            return x.collectives.all_reduce_add_norm(x.own_TE, residual, self)
        return add_rms_norm(
            x, residual, self.weight, self.eps, weighting=self.weighting, backend=self.backend
        )
