"""Rotary embedding on GPU: one program a token, all its heads.

T tokens, H heads, D head dim, E = D / 2; powers of two pad H and E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_heads(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cos_1E: tl.tensor,
    sin_1E: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    head_H1 = tl.arange(0, BLOCK_H)[:, None]
    half_1E = tl.arange(0, BLOCK_E)[None, :]
    inside_HE = (head_H1 < HEADS) & (half_1E < HALF)
    offset_HE = head_H1 * (2 * HALF) + half_1E
    low_HE = tl.load(x_ptr + offset_HE, mask=inside_HE, other=0.0)
    high_HE = tl.load(x_ptr + offset_HE + HALF, mask=inside_HE, other=0.0)
    dtype = low_HE.dtype
    wide_low_HE, wide_high_HE = low_HE.to(tl.float32), high_HE.to(tl.float32)
    if not WIDE:
        cos_1E, sin_1E = cos_1E.to(dtype).to(tl.float32), sin_1E.to(dtype).to(tl.float32)
    low_cos_HE, high_sin_HE = wide_low_HE * cos_1E, wide_high_HE * sin_1E
    high_cos_HE, low_sin_HE = wide_high_HE * cos_1E, wide_low_HE * sin_1E
    if not WIDE:
        # Each product is rounded to the dtype, as separate torch ops round it.
        low_cos_HE = low_cos_HE.to(dtype).to(tl.float32)
        high_sin_HE = high_sin_HE.to(dtype).to(tl.float32)
        high_cos_HE = high_cos_HE.to(dtype).to(tl.float32)
        low_sin_HE = low_sin_HE.to(dtype).to(tl.float32)
    tl.store(out_ptr + offset_HE, (low_cos_HE - high_sin_HE).to(dtype), mask=inside_HE)
    tl.store(out_ptr + offset_HE + HALF, (high_cos_HE + low_sin_HE).to(dtype), mask=inside_HE)


@triton.jit
def _rotary_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    q_stride: tl.int64,
    k_stride: tl.int64,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    half_1E = tl.arange(0, BLOCK_E)[None, :]
    table_ptr = cos_sin_ptr + position * (2 * HALF) + half_1E
    cos_1E = tl.load(table_ptr, mask=half_1E < HALF, other=0.0)
    sin_1E = tl.load(table_ptr + HALF, mask=half_1E < HALF, other=0.0)
    q_out = q_out_ptr + token * (Q_HEADS * 2 * HALF)
    k_out = k_out_ptr + token * (K_HEADS * 2 * HALF)
    q_row, k_row = q_ptr + token * q_stride, k_ptr + token * k_stride
    _rotate_heads(q_row, q_out, cos_1E, sin_1E, Q_HEADS, HALF, BLOCK_Q, BLOCK_E, WIDE)
    _rotate_heads(k_row, k_out, cos_1E, sin_1E, K_HEADS, HALF, BLOCK_K, BLOCK_E, WIDE)


def apply_rotary(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    *,
    wide: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.rotary.apply_rotary`."""
    q_THD, k_TKD = _packed_heads(q_THD), _packed_heads(k_TKD)
    num_tokens, q_heads, head_dim = q_THD.shape
    k_heads, half = k_TKD.shape[1], head_dim // 2
    q_out_THD = q_THD.new_empty(q_THD.shape)
    k_out_TKD = k_TKD.new_empty(k_TKD.shape)
    if num_tokens:
        _rotary_kernel[(num_tokens,)](
            q_THD,
            k_TKD,
            q_out_THD,
            k_out_TKD,
            positions_T.contiguous(),
            cos_sin_MD.contiguous(),
            q_THD.stride(0),
            k_TKD.stride(0),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            HALF=half,
            BLOCK_Q=triton.next_power_of_2(q_heads),
            BLOCK_K=triton.next_power_of_2(k_heads),
            BLOCK_E=triton.next_power_of_2(half),
            WIDE=wide,
            # As in `store`: products are rounded before they are added.
            enable_fp_fusion=False,
        )
    return q_out_THD, k_out_TKD


def _packed_heads(x_THD: torch.Tensor) -> torch.Tensor:
    """The tensor itself when each token's heads lie together, as in a slice of fused QKV."""
    packed = x_THD.stride(2) == 1 and x_THD.stride(1) == x_THD.shape[2]
    return x_THD if packed else x_THD.contiguous()
