"""Head norms, rotation and KV write on GPU: one program takes a few heads of a token.

T tokens, H heads of a program (query, key and value heads in the order of the projection),
D head dim, E = D / 2 padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.quant.fp8_kv import as_bytes
from kernels.quant.fp8_kv_triton import codes_of, head_scale, largest_finite, stored_scale
from kernels.rotary.types import HeadNorms, KVTarget

_HEADS_PER_PROGRAM = 4


@triton.jit
def _normed(
    low_HE: tl.tensor,
    high_HE: tl.tensor,
    is_q_H1: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    half_1E: tl.tensor,
    eps: tl.float32,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    OFFSET: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    dtype: tl.constexpr = low_HE.dtype
    low_HE, high_HE = low_HE.to(tl.float32), high_HE.to(tl.float32)
    square_HE = low_HE * low_HE + high_HE * high_HE
    scale_H1 = (1.0 / tl.sqrt(tl.sum(square_HE, axis=1) / (2 * HALF) + eps))[:, None]
    inside_1E = half_1E < HALF
    q_low_1E = tl.load(q_weight_ptr + half_1E, mask=inside_1E, other=0.0)
    q_high_1E = tl.load(q_weight_ptr + HALF + half_1E, mask=inside_1E, other=0.0)
    k_low_1E = tl.load(k_weight_ptr + half_1E, mask=inside_1E, other=0.0)
    k_high_1E = tl.load(k_weight_ptr + HALF + half_1E, mask=inside_1E, other=0.0)
    low_weight_HE = tl.where(is_q_H1, q_low_1E, k_low_1E).to(tl.float32)
    high_weight_HE = tl.where(is_q_H1, q_high_1E, k_high_1E).to(tl.float32)
    if OFFSET:
        low_weight_HE, high_weight_HE = 1.0 + low_weight_HE, 1.0 + high_weight_HE
    low_HE, high_HE = low_HE * scale_H1, high_HE * scale_H1
    if not WIDE:
        low_HE, high_HE = low_HE.to(dtype).to(tl.float32), high_HE.to(dtype).to(tl.float32)
    return (low_HE * low_weight_HE).to(dtype), (high_HE * high_weight_HE).to(dtype)


@triton.jit
def _rotated(
    low_HE: tl.tensor,
    high_HE: tl.tensor,
    cos_1E: tl.tensor,
    sin_1E: tl.tensor,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    dtype: tl.constexpr = low_HE.dtype
    low_HE, high_HE = low_HE.to(tl.float32), high_HE.to(tl.float32)
    if not WIDE:
        cos_1E, sin_1E = cos_1E.to(dtype).to(tl.float32), sin_1E.to(dtype).to(tl.float32)
    low_cos_HE, high_sin_HE = low_HE * cos_1E, high_HE * sin_1E
    high_cos_HE, low_sin_HE = high_HE * cos_1E, low_HE * sin_1E
    if not WIDE:
        # Each product is rounded to the dtype, as separate torch ops round it.
        low_cos_HE = low_cos_HE.to(dtype).to(tl.float32)
        high_sin_HE = high_sin_HE.to(dtype).to(tl.float32)
        high_cos_HE = high_cos_HE.to(dtype).to(tl.float32)
        low_sin_HE = low_sin_HE.to(dtype).to(tl.float32)
    return (low_cos_HE - high_sin_HE).to(dtype), (high_cos_HE + low_sin_HE).to(dtype)


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    qkv_stride: tl.int64,
    eps: tl.float32,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    WIDE_NORM: tl.constexpr,
    OFFSET_NORM: tl.constexpr,
    WIDE: tl.constexpr,
    SCALED: tl.constexpr,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head_H1 = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    half_1E = tl.arange(0, BLOCK_E)[None, :]
    DIM: tl.constexpr = 2 * HALF
    pointers_HE = qkv_ptr + token * qkv_stride + head_H1 * DIM + half_1E
    inside_HE = (head_H1 < Q_HEADS + 2 * KV_HEADS) & (half_1E < HALF)
    low_HE = tl.load(pointers_HE, mask=inside_HE, other=0.0)
    high_HE = tl.load(pointers_HE + HALF, mask=inside_HE, other=0.0)
    position = tl.load(positions_ptr + token).to(tl.int64)
    table_1E = cos_sin_ptr + position * DIM + half_1E
    cos_1E = tl.load(table_1E, mask=half_1E < HALF, other=0.0)
    sin_1E = tl.load(table_1E + HALF, mask=half_1E < HALF, other=0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)

    is_q_H1 = head_H1 < Q_HEADS
    k_head_H1 = head_H1 - Q_HEADS
    v_head_H1 = k_head_H1 - KV_HEADS
    new_low_HE, new_high_HE = low_HE, high_HE
    if NORM:
        new_low_HE, new_high_HE = _normed(
            low_HE,
            high_HE,
            is_q_H1,
            q_weight_ptr,
            k_weight_ptr,
            half_1E,
            eps,
            HALF,
            WIDE_NORM,
            OFFSET_NORM,
        )
    new_low_HE, new_high_HE = _rotated(new_low_HE, new_high_HE, cos_1E, sin_1E, WIDE)

    q_HE = q_out_ptr + (token * Q_HEADS + head_H1) * DIM + half_1E
    tl.store(q_HE, new_low_HE, mask=inside_HE & is_q_H1)
    tl.store(q_HE + HALF, new_high_HE, mask=inside_HE & is_q_H1)
    kept_HE = inside_HE & (slot >= 0)
    is_k_HE = kept_HE & (k_head_H1 >= 0) & (v_head_H1 < 0)
    k_HE = k_pages_ptr + (slot * KV_HEADS + k_head_H1) * DIM + half_1E
    is_v_HE = kept_HE & (v_head_H1 >= 0)
    v_HE = v_pages_ptr + (slot * KV_HEADS + v_head_H1) * DIM + half_1E
    if SCALED:
        # Programs that have query heads alone are done.
        if (tl.program_id(1) + 1) * BLOCK_H > Q_HEADS:
            low_HE = tl.where(v_head_H1 >= 0, low_HE, new_low_HE)
            high_HE = tl.where(v_head_H1 >= 0, high_HE, new_high_HE)
            low_largest_H1, low_odd_H1 = largest_finite(low_HE)
            high_largest_H1, high_odd_H1 = largest_finite(high_HE)
            odd_H1 = tl.maximum(low_odd_H1, high_odd_H1)
            scale_H1 = head_scale(tl.maximum(low_largest_H1, high_largest_H1))
            low_code_HE = codes_of(low_HE, scale_H1, odd_H1)
            high_code_HE = codes_of(high_HE, scale_H1, odd_H1)
            tl.store(k_HE, low_code_HE, mask=is_k_HE)
            tl.store(k_HE + HALF, high_code_HE, mask=is_k_HE)
            tl.store(v_HE, low_code_HE, mask=is_v_HE)
            tl.store(v_HE + HALF, high_code_HE, mask=is_v_HE)
            kept_scale_H1 = stored_scale(scale_H1, odd_H1)
            kept_H1 = (head_H1 < Q_HEADS + 2 * KV_HEADS) & (slot >= 0)
            k_scale_H1 = k_scales_ptr + (slot // G * KV_HEADS + k_head_H1) * G + slot % G
            is_k_H1 = kept_H1 & (k_head_H1 >= 0) & (v_head_H1 < 0)
            tl.store(k_scale_H1, kept_scale_H1, mask=is_k_H1)
            v_scale_H1 = v_scales_ptr + (slot // G * KV_HEADS + v_head_H1) * G + slot % G
            tl.store(v_scale_H1, kept_scale_H1, mask=kept_H1 & (v_head_H1 >= 0))
    else:
        tl.store(k_HE, new_low_HE, mask=is_k_HE)
        tl.store(k_HE + HALF, new_high_HE, mask=is_k_HE)
        tl.store(v_HE, low_HE, mask=is_v_HE)
        tl.store(v_HE + HALF, high_HE, mask=is_v_HE)


def rotate_and_store(
    qkv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MD: torch.Tensor,
    target: KVTarget,
    norms: HeadNorms | None,
    *,
    wide: bool = False,
    block_h: int = _HEADS_PER_PROGRAM,
) -> torch.Tensor:
    """See `kernels.rotary.rotate_and_store`.

    block_h: heads of a program, a power of two. The sums of a norm may run in another order
    with another number, so it does not depend on the batch.
    """
    k_pages_NGKD, v_pages_NGKD = target.k_pages_NGKD, target.v_pages_NGKD
    assert k_pages_NGKD.is_contiguous() and v_pages_NGKD.is_contiguous()
    assert qkv_TC.stride(1) == 1
    assert target.scales is not None or qkv_TC.dtype == k_pages_NGKD.dtype
    page_size, kv_heads, head_dim = k_pages_NGKD.shape[1:]
    num_tokens, columns = qkv_TC.shape
    num_heads = columns // head_dim - 2 * kv_heads
    q_THD = qkv_TC.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        _rotate_and_store_kernel[(num_tokens, triton.cdiv(num_heads + 2 * kv_heads, block_h))](
            qkv_TC,
            q_THD,
            as_bytes(k_pages_NGKD),
            as_bytes(v_pages_NGKD),
            *(target.scales or (k_pages_NGKD, v_pages_NGKD)),
            target.slots_T.contiguous(),
            positions_T.contiguous(),
            cos_sin_MD,
            qkv_TC if norms is None else norms.q_weight_D,
            qkv_TC if norms is None else norms.k_weight_D,
            qkv_TC.stride(0),
            0.0 if norms is None else norms.eps,
            Q_HEADS=num_heads,
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            NORM=norms is not None,
            WIDE_NORM=norms is not None and norms.weighting != "rounded",
            OFFSET_NORM=norms is not None and norms.weighting == "offset",
            WIDE=wide,
            SCALED=target.scales is not None,
            G=page_size,
            BLOCK_H=block_h,
            BLOCK_E=triton.next_power_of_2(head_dim // 2),
            num_warps=1,
            # A product that goes into a sum unrounded, in one variant and not in another, would
            # give queries other bits beside fp8 pages than beside others.
            enable_fp_fusion=False,
        )
    return q_THD
