"""Rotary position embedding (Su et al., 2021), the "rotate half" layout of Hugging Face.

Shapes: T tokens, H query heads, K key heads, D head dim, M positions of the table, N pages,
G tokens of a page, C = (H + 2 K) D columns of a fused query, key and value projection.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.rotary import reference
from kernels.rotary.types import HeadNorms, KVTarget

__all__ = ["HeadNorms", "KVTarget", "apply_rotary", "rotate_and_store"]


def apply_rotary(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    *,
    wide: bool = False,
    backend: KernelBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions; returns new (q, k).

    q_THD, k_TKD: float32, bfloat16 or float16, D even; positions_T: int32 or int64, below M;
    cos_sin_MD: float32, row p is cat(cos(p * f), sin(p * f)) for the D/2 frequencies f.
    Element i is paired with i + D/2. cos and sin are cast to the dtype of q and multiplied
    in it, as Hugging Face does for most models; `wide` keeps them and the products in float32 and
    rounds the sum alone, as it does for OLMo 2. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.apply_rotary(q_THD, k_TKD, positions_T, cos_sin_MD, wide=wide)
    if backend == "triton":
        from kernels.rotary import triton

        return triton.apply_rotary(q_THD, k_TKD, positions_T, cos_sin_MD, wide=wide)
    raise unknown_backend(backend)


def rotate_and_store(
    qkv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    target: KVTarget,
    *,
    norms: HeadNorms | None = None,
    wide: bool = False,
    backend: KernelBackend,
) -> torch.Tensor:
    """Normalise and rotate the heads of a fused projection, and store its keys and values.

    Equals `rms_norm` of every query and key head (if `norms` are given), `apply_rotary` and
    `write_kv`, rounding where these round; K and D are those of the target's pages and H is what
    is left of C. Rows of qkv_TC may be strided. Returns the queries [T, H, D], contiguous; the
    pages change in place, in the slots of the target only, and a negative slot is skipped.
    wide: as in `apply_rotary`.
    Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.rotate_and_store(qkv_TC, positions_T, cos_sin_MD, target, norms, wide=wide)
    if backend == "triton":
        from kernels.rotary import store

        return store.rotate_and_store(qkv_TC, positions_T, cos_sin_MD, target, norms, wide=wide)
    raise unknown_backend(backend)
