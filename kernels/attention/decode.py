"""Decode attention on GPU: rows of one query, their KV in splits whose results are merged.

Shapes: R rows, H query heads, K kv heads, U = H / K heads of a group padded to M, D head dim
padded to DP, N pages, G page size, P page columns, B KV positions of a block, Z splits.

How a row is split follows from its own KV length alone, so that its result does not depend
on the batch. A batch that fills the GPU by its rows computes the splits of a row one after
the other in one program (`whole.py`); rows that share pages may have the splits of those done
together (`grouped.py`); a smaller batch gives every split a program of its own, here. All do
the arithmetic of `blocks.py`, and so come to the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.blocks import (
    block_state,
    first_block,
    load_pages,
    load_scales,
    lowest_seen,
    split_size,
)
from kernels.attention.call import DecodeCall, decode_call
from kernels.attention.grouped import shared_states
from kernels.attention.heads import as_queries, in_order, zeros
from kernels.attention.runs import are_many, run_states, takes_runs, takes_whole_runs
from kernels.attention.tiles import MAX_SPLITS, MIN_SPLIT, SharedTiles, takes_whole_rows
from kernels.attention.whole import row_height, stages_of, whole_rows
from kernels.quant.fp8_kv import KVScales

_TOGETHER = 8
"""Splits of a row that are merged in one turn; a short row takes one turn, whatever the batch's
longest could have."""


@triton.jit
def _decode_split_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    part_ptr: tl.tensor,
    state_ptr: tl.tensor,
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
) -> None:
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    query = tl.load(query_start_ptr + row).to(tl.int64)
    query_end = tl.load(query_start_ptr + row + 1)
    kv_len = tl.load(kv_len_ptr + row)
    table_row = tl.load(table_rows_ptr + row).to(tl.int64) if INDIRECT else row
    low = lowest_seen(kv_len - 1, WINDOW)
    first = first_block(low, B)
    size = split_size(kv_len - first, B, SPLITS, LEAST)
    begin = first + split * size
    if (query_end - query != 1) | (begin >= kv_len):
        return
    end = tl.minimum(begin + size, kv_len)
    pages_ptr = table_ptr + table_row * table_stride

    head_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    inside_MD = (head_M[:, None] < U) & (dim_D[None, :] < D)
    head_offset_MD = (kv_head * U + head_M[:, None]) * D + dim_D[None, :]
    q_MD = tl.load(q_ptr + query * q_stride_t + head_offset_MD, mask=inside_MD, other=0.0)
    q, scale_M = as_queries(q_MD, scale, M, DP, PAIRED)
    max_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc = zeros(M, DP, PAIRED)
    page_B = load_pages(pages_ptr, begin, end, G, B)
    k_scale_B, v_scale_B = load_scales(
        k_scales_ptr, v_scales_ptr, page_B, begin, end, kv_head, G, B, SCALED
    )
    for block in range(begin, end, B):
        next_B = load_pages(pages_ptr, block + B, end, G, B)
        max_M, sum_M, acc = block_state(
            q,
            k_ptr,
            v_ptr,
            page_B,
            k_scale_B,
            v_scale_B,
            block,
            low,
            end,
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
                k_scales_ptr, v_scales_ptr, page_B, block + B, end, kv_head, G, B, SCALED
            )
    slot_M = (row * tl.num_programs(1) * U + kv_head * U + head_M) * tl.num_programs(2) + split
    part_offset_MD = slot_M[:, None] * D + dim_D[None, :]
    tl.store(part_ptr + part_offset_MD, in_order(acc, PAIRED), mask=inside_MD)
    tl.store(state_ptr + 2 * slot_M, max_M, mask=head_M < U)
    tl.store(state_ptr + 2 * slot_M + 1, sum_M, mask=head_M < U)


@triton.jit
def _decode_merge_kernel(
    part_ptr: tl.tensor,
    state_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    out_ptr: tl.tensor,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    Z: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = tl.load(query_start_ptr + row).to(tl.int64)
    if tl.load(query_start_ptr + row + 1) - query != 1:
        return
    kv_len = tl.load(kv_len_ptr + row)
    walked = kv_len - first_block(lowest_seen(kv_len - 1, WINDOW), B)
    used = tl.cdiv(walked, split_size(walked, B, SPLITS, LEAST))
    slot = (row * tl.num_programs(1) + head) * Z
    dim_D = tl.arange(0, DP)
    run_max, run_sum = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    run_acc_D = tl.zeros([DP], tl.float32)
    for first in tl.range(0, used, TOGETHER):
        for next_one in tl.static_range(TOGETHER):
            # Loads of these splits are in flight together: none depends on the fold, which is
            # `fold_split` for one query row.
            split = first + next_one
            state = state_ptr + 2 * (slot + split)
            split_max = tl.load(state, mask=split < used, other=float("-inf"))
            split_sum = tl.load(state + 1, mask=split < used, other=0.0)
            inside_D = (dim_D < D) & (split < used)
            part_D = tl.load(part_ptr + (slot + split) * D + dim_D, mask=inside_D, other=0.0)
            new_max = tl.maximum(run_max, split_max)
            shrink = tl.where(split < used, tl.exp2(run_max - new_max), 1.0)
            share = tl.where(split < used, tl.exp2(split_max - new_max), 0.0)
            run_sum = tl.fma(run_sum, shrink, split_sum * share)
            run_acc_D = tl.fma(part_D, share, run_acc_D * shrink)
            run_max = new_max
    # A row without KV has no parts; it gets zeros.
    mixed_D = run_acc_D / tl.where(run_sum == 0.0, 1.0, run_sum)
    out_offset_D = (query * tl.num_programs(1) + head) * D + dim_D
    tl.store(out_ptr + out_offset_D, mixed_D.to(out_ptr.dtype.element_ty), mask=dim_D < D)


def decode_attention(
    q_THD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    page_table_RP: torch.Tensor,
    query_start_R1: torch.Tensor,
    kv_len_R: torch.Tensor,
    scale: float,
    out_THD: torch.Tensor,
    table_rows_R: torch.Tensor | None = None,
    max_kv_len: int | None = None,
    shared: SharedTiles | None = None,
    whole: bool | None = None,
    window: int | None = None,
    run: int = 1,
    scales: KVScales | None = None,
) -> None:
    """Fill `out_THD` for the rows that have exactly one query; other rows are left alone.

    table_rows_R, max_kv_len, shared, window, run, scales: see `kernels.attention.paged_attention`.
    whole: one program takes all splits of a row, in place of one for each and a merge; the
    result is the same. None does so when the rows alone fill the GPU or share tiles.
    """
    batch = (q_THD, k_pages_NGKD, v_pages_NGKD, page_table_RP, query_start_R1, kv_len_R)
    call = decode_call(*batch, scale, out_THD, table_rows_R, max_kv_len, window, scales)
    if shared is not None:
        whole_rows(call, (shared.tokens_R, *shared_states(call, shared)))
    elif takes_runs(call, run, window) and (whole is not None or are_many(call, run)):
        if takes_whole_runs(call, run) if whole is None else whole:
            run_states(call, run, None)
        else:
            _split_rows(call, run)
    elif takes_whole_rows(call.num_rows, call.num_kv_heads) if whole is None else whole:
        whole_rows(call)
    else:
        _split_rows(call)


def _split_rows(call: DecodeCall, run: int = 1) -> None:
    """A program for each split of a row or a run, then one for each row and head."""
    q_THD, num_rows = call.inputs[0], call.num_rows
    splits = max(min(MAX_SPLITS, triton.cdiv(call.max_kv_len, MIN_SPLIT)), 1)
    part_RHZD = q_THD.new_empty(
        num_rows, q_THD.shape[1], splits, q_THD.shape[2], dtype=torch.float32
    )
    parts = (part_RHZD, part_RHZD.new_empty(*part_RHZD.shape[:3], 2))
    if run > 1:
        run_states(call, run, parts)
    else:
        _decode_split_kernel[(num_rows, call.num_kv_heads, splits)](
            *call.inputs,
            call.kv_len_R,
            *parts,
            call.scale,
            *call.strides,
            **call.shape,
            **call.cut,
            M=row_height(call),
            num_warps=4,
            num_stages=stages_of(call),
        )
    _decode_merge_kernel[(num_rows, q_THD.shape[1])](
        *parts,
        call.inputs[-1],
        call.kv_len_R,
        call.out_THD,
        D=call.shape["D"],
        DP=call.shape["DP"],
        B=call.shape["B"],
        **call.cut,
        Z=splits,
        TOGETHER=min(splits, _TOGETHER),
        num_warps=1,
    )
