"""Rotary embedding in plain torch. T tokens, H heads, D head dim, E = D / 2, M positions."""

from __future__ import annotations

import torch

from kernels.kv_copy import reference as kv_copy
from kernels.norm import reference as norm
from kernels.rotary.types import HeadNorms, KVTarget


def apply_rotary(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    *,
    wide: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.rotary.apply_rotary`."""
    dtype = torch.float32 if wide else q_THD.dtype
    cos_sin_T1D = cos_sin_MD[positions_T].to(dtype).unsqueeze(1)
    cos_T1E, sin_T1E = cos_sin_T1D.chunk(2, dim=-1)
    return _rotate(q_THD, cos_T1E, sin_T1E), _rotate(k_TKD, cos_T1E, sin_T1E)


def _rotate(x_THD: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    wide_THD = x_THD.to(cos_T1E.dtype)
    out_THD = torch.empty_like(wide_THD, memory_format=torch.contiguous_format)
    low_THE, high_THE = wide_THD.chunk(2, dim=-1)
    out_low_THE, out_high_THE = out_THD.chunk(2, dim=-1)
    torch.sub(low_THE * cos_T1E, high_THE * sin_T1E, out=out_low_THE)
    torch.add(high_THE * cos_T1E, low_THE * sin_T1E, out=out_high_THE)
    return out_THD.to(x_THD.dtype)


def rotate_and_store(
    qkv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    target: KVTarget,
    norms: HeadNorms | None,
    *,
    wide: bool = False,
) -> torch.Tensor:
    """See `kernels.rotary.rotate_and_store`."""
    kv_heads, head_dim = target.k_pages_NGKD.shape[2:]
    heads_TCD = qkv_TC.unflatten(-1, (-1, head_dim))
    num_heads = heads_TCD.shape[1] - 2 * kv_heads
    q_THD, k_TKD, v_TKD = heads_TCD.split([num_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q_THD = norm.rms_norm(q_THD, norms.q_weight_D, norms.eps, norms.weighting)
        k_TKD = norm.rms_norm(k_TKD, norms.k_weight_D, norms.eps, norms.weighting)
    q_THD, k_TKD = apply_rotary(q_THD, k_TKD, positions_T, cos_sin_MD, wide=wide)
    pages = (target.k_pages_NGKD, target.v_pages_NGKD)
    kv_copy.write_kv(k_TKD, v_TKD, *pages, target.slots_T, target.scales)
    return q_THD
