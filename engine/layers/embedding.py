"""Token embedding and the head that turns hidden states into logits.

Legend: T tokens, S rows to sample, E hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.norm import RMSNorm
from engine.layers.parameter import ShardedParameter, sliced, uneven_shard
from engine.layers.runtime import LayerRuntime
from engine.parallel.mesh import Mesh
from kernels.embedding import embed_rms_norm
from kernels.linear import fused_linear


def vocab_sizes(vocab_size: int, mesh: Mesh) -> list[int]:
    """Rows of the vocabulary that each rank holds."""
    places = [Mesh(tp_rank=rank, tp_size=mesh.tp_size) for rank in range(mesh.tp_size)]
    return [uneven_shard(vocab_size, place).length for place in places]


def _vocab_parameter(vocab_size: int, hidden_size: int, runtime: LayerRuntime) -> ShardedParameter:
    shard = uneven_shard(vocab_size, runtime.mesh)
    storage = torch.empty(shard.length, hidden_size, dtype=runtime.dtype, device=runtime.device)
    return ShardedParameter(storage, sliced((vocab_size, hidden_size), 0, shard))


class VocabEmbedding(nn.Module):
    """Rows of the vocabulary, which ranks divide; a token's row is on one of them.

    scale: what a row is multiplied by after it is looked up, rounded to the dtype first, as
    Hugging Face's Gemma does; the head that is tied to this has none.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, runtime: LayerRuntime, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = float(torch.tensor(scale, dtype=runtime.dtype, device="cpu"))
        self.shard = uneven_shard(vocab_size, runtime.mesh)
        self.is_sharded = runtime.mesh.tp_size > 1
        self.collectives = runtime.collectives
        self.backend = runtime.backend
        self.weight = _vocab_parameter(vocab_size, hidden_size, runtime)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Token ids int [T] -> [T, E]; each rank adds zeros for the rows of others."""
        rows_TE = self._rows(ids_T)
        return rows_TE if self.scale == 1.0 else rows_TE * self.scale

    def _rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        if not self.is_sharded:
            return F.embedding(ids_T, self.weight)
        local_T = ids_T - self.shard.start
        is_mine_T = (local_T >= 0) & (local_T < self.shard.length)
        rows_TE = F.embedding(local_T.where(is_mine_T, 0), self.weight)
        return self.collectives.all_reduce(rows_TE.where(is_mine_T[:, None], 0))

    def normed(self, ids_T: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int [T] -> (norm of their rows, their rows), both [T, E]."""
        if self.is_sharded or self.scale != 1.0 or norm.weighting != "rounded":
            rows_TE = self(ids_T)
            return norm(rows_TE), rows_TE
        return embed_rms_norm(ids_T, self.weight, norm.weight, norm.eps, backend=self.backend)


class LMHead(nn.Module):
    """Hidden states to logits, each rank computing those of its rows of the vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        runtime: LayerRuntime,
        tied_to: VocabEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.collectives = runtime.collectives
        self.sizes = vocab_sizes(vocab_size, runtime.mesh)
        self.backend = runtime.backend
        self.few_rows = max(runtime.few_rows, runtime.few_rows_apart)
        if tied_to is None:
            self.weight = _vocab_parameter(vocab_size, hidden_size, runtime)
        else:
            self.weight = tied_to.weight

    def forward(self, hidden_SE: torch.Tensor, *, widen: bool = True) -> torch.Tensor:
        """[S, E] -> [S, V]: multiplied in the model's dtype, then widened to float32.

        widen: False returns the product as it is, the same values in half the bytes.
        """
        if len(hidden_SE) <= self.few_rows:
            own = fused_linear(hidden_SE, self.weight, backend=self.backend)
        else:
            own = F.linear(hidden_SE, self.weight)
        logits_SV = self.collectives.all_gather_last(own, self.sizes)
        return logits_SV.float() if widen else logits_SV
