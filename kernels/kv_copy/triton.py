"""KV writes on GPU: one program a token. T tokens, K kv heads, D head dim, N pages, G page size;
with scales HP and DP pad K and D to powers of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.quant.fp8_kv import KVScales, as_bytes
from kernels.quant.fp8_kv_triton import codes_of, head_scale, largest_finite, stored_scale


@triton.jit
def _write_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_stride: tl.int64,
    v_stride: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        offset = tl.arange(0, BLOCK)
        inside = offset < WIDTH
        k = tl.load(k_ptr + token * k_stride + offset, mask=inside)
        v = tl.load(v_ptr + token * v_stride + offset, mask=inside)
        tl.store(k_pages_ptr + slot * WIDTH + offset, k, mask=inside)
        tl.store(v_pages_ptr + slot * WIDTH + offset, v, mask=inside)


@triton.jit
def _write_scaled_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_stride: tl.int64,
    v_stride: tl.int64,
    K: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
) -> None:
    token, is_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    x_ptr, pages_ptr, scales_ptr = k_ptr + token * k_stride, k_pages_ptr, k_scales_ptr
    if is_v == 1:
        x_ptr, pages_ptr, scales_ptr = v_ptr + token * v_stride, v_pages_ptr, v_scales_ptr
    head_H1, dim_1D = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    inside_HD = (head_H1 < K) & (dim_1D < D)
    offset_HD = head_H1 * D + dim_1D
    x_HD = tl.load(x_ptr + offset_HD, mask=inside_HD, other=0.0)
    largest_H1, odd_H1 = largest_finite(x_HD)
    scale_H1 = head_scale(largest_H1)
    codes_HD = codes_of(x_HD, scale_H1, odd_H1)
    tl.store(pages_ptr + slot * (K * D) + offset_HD, codes_HD, mask=inside_HD)
    scale_at_H1 = scales_ptr + (slot // G * K + head_H1) * G + slot % G
    tl.store(scale_at_H1, stored_scale(scale_H1, odd_H1), mask=head_H1 < K)


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    slots_T: torch.Tensor,
    scales: KVScales | None = None,
) -> None:
    """See `kernels.kv_copy.write_kv`."""
    assert k_pages_NGKD.is_contiguous() and v_pages_NGKD.is_contiguous()
    page_size, num_heads, head_dim = k_pages_NGKD.shape[1:]
    k_rows, v_rows = _rows(k_TKD), _rows(v_TKD)
    num_tokens, width = k_rows.shape
    if not num_tokens:
        return
    slots_T = slots_T.contiguous()
    strides = k_rows.stride(0), v_rows.stride(0)
    if scales is None:
        _write_kv_kernel[(num_tokens,)](
            k_rows,
            v_rows,
            k_pages_NGKD,
            v_pages_NGKD,
            slots_T,
            *strides,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
        )
        return
    _write_scaled_kernel[(num_tokens, 2)](
        k_rows,
        v_rows,
        as_bytes(k_pages_NGKD),
        as_bytes(v_pages_NGKD),
        *scales,
        slots_T,
        *strides,
        K=num_heads,
        D=head_dim,
        G=page_size,
        HP=triton.next_power_of_2(num_heads),
        DP=triton.next_power_of_2(head_dim),
    )


def _rows(x_TKD: torch.Tensor) -> torch.Tensor:
    rows = x_TKD.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
