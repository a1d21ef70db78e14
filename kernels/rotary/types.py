"""Arguments of the fused rotation. T tokens, K kv heads, D head dim, N pages, G page size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.quant.fp8_kv import KVScales
from kernels.weighting import Weighting


@dataclass(frozen=True)
class KVTarget:
    """Where the tokens of a step keep their keys and values in one layer.

    k_pages_NGKD, v_pages_NGKD: contiguous, in the dtype of the tokens, or e4m3 with `scales`.
    slots_T: int32 or int64, page * G + offset of each token, distinct; negative for none.
    """

    k_pages_NGKD: torch.Tensor
    v_pages_NGKD: torch.Tensor
    slots_T: torch.Tensor
    scales: KVScales | None = None


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of single query and key heads: their weights, and what both have in common."""

    q_weight_D: torch.Tensor
    k_weight_D: torch.Tensor
    eps: float
    weighting: Weighting = "rounded"
