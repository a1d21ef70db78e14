"""Token embedding with the norm of the first layer.

Shapes: T tokens, V rows of the table, E hidden size.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.embedding import reference


def embed_rms_norm(
    ids_T: torch.Tensor,
    table_VE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    *,
    backend: KernelBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up tokens: returns (`rms_norm` of their rows, the rows), both [T, E].

    ids_T: int32 or int64, below V; table_VE: contiguous, float32, bfloat16 or float16;
    weight_E: the same dtype. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.embed_rms_norm(ids_T, table_VE, weight_E, eps)
    if backend == "triton":
        from kernels.embedding import triton

        return triton.embed_rms_norm(ids_T, table_VE, weight_E, eps)
    raise unknown_backend(backend)
