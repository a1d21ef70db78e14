"""Embedding and norm in plain torch. T tokens, V vocabulary, E hidden size."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.norm import reference as norm


def embed_rms_norm(
    ids_T: torch.Tensor, table_VE: torch.Tensor, weight_E: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.embedding.embed_rms_norm`."""
    rows_TE = F.embedding(ids_T, table_VE)
    return norm.rms_norm(rows_TE, weight_E, eps), rows_TE
