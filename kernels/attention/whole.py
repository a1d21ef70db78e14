"""Decode attention of whole rows: one program takes all splits of a row and kv head in turn.

Shapes as in `kernels.attention.decode`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.blocks import (
    block_state,
    first_block,
    fold_split,
    load_pages,
    load_scales,
    lowest_seen,
    split_size,
)
from kernels.attention.call import DecodeCall
from kernels.attention.heads import as_heads, as_queries, in_order, zeros


@triton.jit
def whole_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    state_acc_ptr: tl.tensor,
    state_ptr: tl.tensor,
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
    PAIRED: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    INDIRECT: tl.constexpr,
    RESUME: tl.constexpr,
) -> None:
    """RESUME: a row goes on from the state that `shared_kernel` left for its first tokens."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # All that the row says of itself is asked for at once, before the first answer is used.
    query = tl.load(query_start_ptr + row).to(tl.int64)
    query_end = tl.load(query_start_ptr + row + 1)
    kv_len = tl.load(kv_len_ptr + row)
    table_row = tl.load(table_rows_ptr + row).to(tl.int64) if INDIRECT else row
    shared = tl.load(tokens_ptr + row) if RESUME else 0
    if query_end - query != 1:
        return
    low = lowest_seen(kv_len - 1, WINDOW)
    begin = first_block(low, B)
    size = split_size(kv_len - begin, B, SPLITS, LEAST)
    pages_ptr = table_ptr + table_row * table_stride

    # Larger splits end elsewhere than those of a tile: such a row reads all its KV itself.
    start = tl.where(size == LEAST, shared, 0) if RESUME else begin
    page_B = load_pages(pages_ptr, start, kv_len, G, B)
    k_scale_B, v_scale_B = load_scales(
        k_scales_ptr, v_scales_ptr, page_B, start, kv_len, kv_head, G, B, SCALED
    )

    head_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    inside_MD = (head_M[:, None] < U) & (dim_D[None, :] < D)
    head_offset_MD = (kv_head * U + head_M[:, None]) * D + dim_D[None, :]
    q_MD = tl.load(q_ptr + query * q_stride_t + head_offset_MD, mask=inside_MD, other=0.0)
    q, scale_M = as_queries(q_MD, scale, M, DP, PAIRED)
    max_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc = zeros(M, DP, PAIRED)
    run_max_M = tl.full([M], float("-inf"), tl.float32)
    run_sum_M = tl.zeros([M], tl.float32)
    run_acc = zeros(M, DP, PAIRED)
    if RESUME:
        known_M = (head_M < U) & (start > 0)
        slot_M = (row * tl.num_programs(1) + kv_head) * U + head_M
        run_max_M = tl.load(state_ptr + 2 * slot_M, mask=known_M, other=float("-inf"))
        run_sum_M = tl.load(state_ptr + 2 * slot_M + 1, mask=known_M, other=0.0)
        acc_offset_MD = slot_M[:, None] * D + dim_D[None, :]
        known_MD = known_M[:, None] & (dim_D[None, :] < D)
        run_acc_MD = tl.load(state_acc_ptr + acc_offset_MD, mask=known_MD, other=0.0)
        run_acc = as_heads(run_acc_MD, M, DP, PAIRED)
    # One loop over blocks, so that loads run ahead also where a split ends.
    for block in range(start, kv_len, B):
        next_B = load_pages(pages_ptr, block + B, kv_len, G, B)
        max_M, sum_M, acc = block_state(
            q,
            k_ptr,
            v_ptr,
            page_B,
            k_scale_B,
            v_scale_B,
            block,
            low,
            kv_len,
            kv_head * kv_stride_k,
            kv_stride_n,
            kv_stride_g,
            scale_M,
            max_M,
            sum_M,
            acc,
            False,
            False,
            WINDOW,
            M,
            D,
            DP,
            G,
            B,
            SCALED,
            PAIRED,
        )
        page_B = next_B
        if SCALED:
            k_scale_B, v_scale_B = load_scales(
                k_scales_ptr, v_scales_ptr, page_B, block + B, kv_len, kv_head, G, B, SCALED
            )
        if ((block + B - begin) % size == 0) | (block + B >= kv_len):
            run_max_M, run_sum_M, run_acc = fold_split(
                run_max_M, run_sum_M, run_acc, max_M, sum_M, acc, PAIRED
            )
            max_M = tl.full([M], float("-inf"), tl.float32)
            sum_M = tl.zeros([M], tl.float32)
            acc = zeros(M, DP, PAIRED)
    # A row without KV gets zeros.
    out_MD = in_order(run_acc, PAIRED) / tl.where(run_sum_M == 0.0, 1.0, run_sum_M)[:, None]
    out_offset_MD = query * tl.num_programs(1) * U * D + head_offset_MD
    tl.store(out_ptr + out_offset_MD, out_MD.to(out_ptr.dtype.element_ty), mask=inside_MD)


def row_height(call: DecodeCall) -> int:
    """Query rows of a tile that holds the heads of one row: tensor cores take 16 at least."""
    return max(triton.next_power_of_2(call.shape["U"]), 16)


def stages_of(call: DecodeCall) -> int:
    """Blocks that are loaded at a time. Of codes one: microseconds of a layer on an H100, for 1,024
    rows of 12 query heads on 2, 64 and 512 tokens of their own: 48.5 and 158 with one, 58.7 and 178
    with two, 64 and 183 with three."""
    return 1 if call.shape["SCALED"] else 2


def whole_rows(
    call: DecodeCall,
    known: tuple[torch.Tensor, ...] | None = None,
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    max_registers: int | None = None,
) -> None:
    """Attend all rows of one query, each in one program for a kv head.

    known: (shared tokens of each row, and the states that `shared_states` returned for them).
    num_stages: None takes `stages_of`. max_registers: of a thread.
    """
    # Without known states their pointers are never read.
    states = (call.kv_len_R, call.out_THD, call.out_THD) if known is None else known
    whole_kernel[(call.num_rows, call.num_kv_heads)](
        *call.inputs,
        call.kv_len_R,
        *states,
        call.out_THD,
        call.scale,
        *call.strides,
        **call.shape,
        **call.cut,
        M=row_height(call),
        RESUME=known is not None,
        num_warps=num_warps,
        num_stages=num_stages or stages_of(call),
        maxnreg=max_registers,
    )
