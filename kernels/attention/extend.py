"""Prefill attention on GPU: rows of two or more queries over paged KV, online softmax.

Shapes: R rows, H query heads, K kv heads, U = H / K heads of a group, M tile rows (a tile row
is one query of one head of the group), D head dim padded to DP, N pages, G page size, P page
columns, B KV positions of a block.

A query walks the KV in blocks from position 0, wherever its tile begins, so that its result
does not depend on how the prompt was cut into chunks nor on the other rows. With a window, tiles
skip the blocks that none of their queries sees: what a query does not see leaves its state as it
was, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.blocks import LOG2_E, decoded, first_block, lowest_seen
from kernels.quant.fp8_kv import KVScales


@triton.jit
def _extend_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.float32,
    q_stride_t: tl.int64,
    kv_stride_n: tl.int64,
    kv_stride_g: tl.int64,
    kv_stride_k: tl.int64,
    table_stride: tl.int64,
    U: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    INDIRECT: tl.constexpr,
) -> None:
    # Late tiles see the most KV: started first, they do not trail at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(query_start_ptr + row).to(tl.int64)
    num_queries = (tl.load(query_start_ptr + row + 1) - start).to(tl.int32)
    first = tile * (M // U)
    if num_queries < 2 or first >= num_queries:
        return
    table_row = tl.load(table_rows_ptr + row).to(tl.int64) if INDIRECT else row
    pages_ptr = table_ptr + table_row * table_stride
    seen_before = tl.load(kv_len_ptr + row) - num_queries
    tile_row_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    query_M = first + tile_row_M // U
    head_M = kv_head * U + tile_row_M % U
    valid_M = (tile_row_M < (M // U) * U) & (query_M < num_queries)
    inside_MD = valid_M[:, None] & (dim_D[None, :] < D)
    offset_MD = head_M[:, None] * D + dim_D[None, :]
    q_offset_MD = (start + query_M)[:, None] * q_stride_t + offset_MD
    q_MD = tl.load(q_ptr + q_offset_MD, mask=inside_MD, other=0.0)

    max_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc_MD = tl.zeros([M, DP], tl.float32)
    last_M = seen_before + query_M
    end = seen_before + tl.minimum(first + M // U, num_queries)
    low = lowest_seen(seen_before + first, WINDOW)
    for block in range(first_block(low, B), end, B):
        position_B = block + tl.arange(0, B)
        seen_B = position_B < end
        if WINDOW:
            seen_B = seen_B & (position_B >= low)
        page_B = tl.load(pages_ptr + position_B // G, mask=seen_B, other=0).to(tl.int64)
        base_B = page_B * kv_stride_n + (position_B % G) * kv_stride_g + kv_head * kv_stride_k
        kv_offset_BD = base_B[:, None] + dim_D[None, :]
        inside_BD = seen_B[:, None] & (dim_D[None, :] < D)
        k_BD = tl.load(k_ptr + kv_offset_BD, mask=inside_BD, other=0.0)
        v_BD = tl.load(v_ptr + kv_offset_BD, mask=inside_BD, other=0.0)
        score_MB = tl.dot(q_MD, tl.trans(decoded(k_BD, SCALED, q_MD.dtype)), input_precision="ieee")
        if SCALED:
            scale_B = ((page_B * tl.num_programs(1) + kv_head) * G) + position_B % G
            k_scale_B = tl.load(k_scales_ptr + scale_B, mask=seen_B, other=0.0).to(tl.float32)
            v_scale_B = tl.load(v_scales_ptr + scale_B, mask=seen_B, other=0.0).to(tl.float32)
            score_MB = score_MB * k_scale_B[None, :]
        score_MB = score_MB * scale
        visible_MB = position_B[None, :] <= last_M[:, None]
        if WINDOW:
            visible_MB = visible_MB & (position_B[None, :] > (last_M - WINDOW)[:, None])
        score_MB = tl.where(visible_MB, score_MB, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MB, axis=1))
        finite_max_M = new_max_M
        if WINDOW:
            # A query that has seen nothing yet has no maximum to subtract.
            finite_max_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        shrink_M = tl.exp2(max_M - finite_max_M)
        prob_MB = tl.exp2(score_MB - finite_max_M[:, None])
        sum_M = sum_M * shrink_M + tl.sum(prob_MB, axis=1)
        if SCALED:
            prob_MB = prob_MB * v_scale_B[None, :]
        acc_MD = acc_MD * shrink_M[:, None]
        part_MB, v_BD = prob_MB.to(q_MD.dtype), decoded(v_BD, SCALED, q_MD.dtype)
        acc_MD = tl.dot(part_MB, v_BD, acc_MD, input_precision="ieee")
        max_M = new_max_M

    if WINDOW:
        # Rows that pad the tile may have seen nothing.
        sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    out_offset_MD = (start + query_M)[:, None] * (tl.num_programs(1) * U * D) + offset_MD
    out_MD = (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset_MD, out_MD, mask=inside_MD)


def extend_attention(
    q_THD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    page_table_RP: torch.Tensor,
    query_start_R1: torch.Tensor,
    kv_len_R: torch.Tensor,
    scale: float,
    max_query_len: int,
    out_THD: torch.Tensor,
    table_rows_R: torch.Tensor | None = None,
    window: int | None = None,
    scales: KVScales | None = None,
) -> None:
    """Fill `out_THD` for the rows that have two or more queries; others are left alone.

    table_rows_R, window, scales: see `kernels.attention.paged_attention`.
    """
    num_heads, head_dim = q_THD.shape[1:]
    page_size, num_kv_heads = k_pages_NGKD.shape[1:3]
    group, padded_dim = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    wide = q_THD.dtype == torch.float32 or padded_dim > 128
    tile = max(triton.next_power_of_2(group), 32 if wide else 64)
    grid = (triton.cdiv(max_query_len, tile // group), num_kv_heads, kv_len_R.shape[0])
    _extend_kernel[grid](
        q_THD,
        k_pages_NGKD,
        v_pages_NGKD,
        *(scales or (k_pages_NGKD, v_pages_NGKD)),
        page_table_RP,
        kv_len_R if table_rows_R is None else table_rows_R,
        query_start_R1,
        kv_len_R,
        out_THD,
        scale * LOG2_E,
        q_THD.stride(0),
        *k_pages_NGKD.stride()[:3],
        page_table_RP.stride(0),
        U=group,
        M=tile,
        D=head_dim,
        DP=padded_dim,
        G=page_size,
        B=32 if wide else 64,
        SCALED=scales is not None,
        WINDOW=window or 0,
        INDIRECT=table_rows_R is not None,
        num_warps=4,
        num_stages=2,
    )
