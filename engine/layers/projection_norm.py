"""Norms of queries and keys over all heads of a projection together, as OLMo 2 has them.

Legend: T tokens, C columns of the fused query, key and value projection.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.kinds import NormKind
from engine.layers.parameter import Shard, ShardedParameter, sliced
from engine.layers.runtime import LayerRuntime
from kernels.norm import rms_norm
from kernels.norm.reference import weighted


class ProjectionNorm(nn.Module):
    """A norm over all heads of a projection, which ranks divide, each with its own heads' weight.

    copies: ranks that hold the same heads; their squares count once.
    """

    def __init__(
        self, size: int, shard: Shard, copies: int, kind: NormKind, *, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        self.eps = kind.eps
        self.weighting = kind.weighting
        self.backend = runtime.backend
        self.size = size
        self.copies = copies
        storage = torch.empty(shard.length, dtype=runtime.dtype, device=runtime.device)
        self.weight = ShardedParameter(storage, sliced((size,), 0, shard))


class ProjectionNorms:
    """The norms of queries and keys over all heads (OLMo 2), of one layer.

    A rank that holds some of the heads needs the squares of the others: queries and keys ask for
    theirs in one sum over ranks.
    """

    def __init__(self, q_norm: ProjectionNorm, k_norm: ProjectionNorm, runtime: LayerRuntime):
        self.norms = (q_norm, k_norm)
        self.is_sharded = runtime.mesh.tp_size > 1
        self.collectives = runtime.collectives

    def __call__(self, qkv_TC: torch.Tensor) -> None:
        """Normalise the query and key columns of a fused projection, in place."""
        q_norm, k_norm = self.norms
        sizes = [len(q_norm.weight), len(k_norm.weight)]
        parts = qkv_TC[:, : sum(sizes)].split(sizes, dim=-1)
        if self.is_sharded:
            self._over_ranks(parts)
            return
        for part, norm in zip(parts, self.norms, strict=True):
            part.copy_(
                rms_norm(
                    part, norm.weight, norm.eps, weighting=norm.weighting, backend=norm.backend
                )
            )

    def _over_ranks(self, parts: tuple[torch.Tensor, ...]) -> None:
        squares = [part.float().square().sum(-1) for part in parts]
        totals = self.collectives.all_reduce(torch.stack(squares)).unbind(0)
        for part, norm, total_T in zip(parts, self.norms, totals, strict=True):
            mean_T1 = total_T.unsqueeze(-1) / (norm.copies * norm.size)
            normed = part.float() * torch.rsqrt(mean_T1 + norm.eps)
            part.copy_(weighted(normed, norm.weight, norm.weighting, part.dtype))
