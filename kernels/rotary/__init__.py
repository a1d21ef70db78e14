"""Rotary position embedding (Su et al., 2021), the "rotate half" layout of Hugging Face.

Shapes: T tokens, H query heads, K key heads, D head dim, M positions of the table.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.rotary import reference


def apply_rotary(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    *,
    backend: KernelBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions; returns new (q, k).

    q_THD, k_TKD: float32, bfloat16 or float16, D even; positions_T: int32 or int64, below M;
    cos_sin_MD: float32, row p is cat(cos(p * f), sin(p * f)) for the D/2 frequencies f.
    Element i is paired with i + D/2. cos and sin are cast to the dtype of q and multiplied
    in it, as Hugging Face does. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.apply_rotary(q_THD, k_TKD, positions_T, cos_sin_MD)
    if backend == "triton":
        from kernels.rotary import triton

        return triton.apply_rotary(q_THD, k_TKD, positions_T, cos_sin_MD)
    raise unknown_backend(backend)
