"""Decode attention of runs: adjacent rows of one sequence, each a token longer than the one before.

A step that verifies drafts has J rows for a sequence, whose KV is the same but for the last few
positions. One program takes the query heads of all of them, so that KV is read once for the run
and not once for each row. Rows end where they end: what a row gets has the bits that
`whole.py` and `decode.py` give it.

Shapes: R rows in runs of J, K kv heads, U = H / K query heads of a kv head, M >= J * U query rows
of a tile, D head dim padded to DP, G page size, B KV positions of a block, Z splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.blocks import (
    block_state,
    fold_split,
    load_block,
    load_pages,
    load_scales,
    row_sum,
    scores,
    split_size,
    value_shift,
    weighed,
)
from kernels.attention.call import DecodeCall
from kernels.attention.heads import as_queries, in_order, power_of_two, zeros
from kernels.attention.tiles import takes_whole_rows

HIGHEST = 64
"""Query rows of a tile at most; a run of more is read row by row."""
RUNS_FROM = 32
"""Runs times kv heads from which reading a run once pays: fewer leave the GPU idle, whose rows then
find each other's KV in the L2 cache. Runs of 4 rows on an H100 (heads of 128, bf16), microseconds
of a layer, 12 query heads on 2 kv heads (tiles of 32 query rows) and 32 on 8 (of 16):

    runs, tokens    row by row   splits of runs   whole runs
    1, 700             7.5, 9.2       11.6, 10.1   30.3, 19.0
    4, 700            9.6, 19.0       12.4, 14.6   31.8, 22.4
    16, 700          18.9, 40.9       18.0, 42.3   34.4, 31.3
    16, 3,000       62.4, 143.2      41.2, 102.2  112.1, 84.8
    64, 700         41.5, 125.6      59.7, 160.1   46.3, 94.1
    128, 700        68.3, 233.0     112.2, 314.0  69.0, 174.8

Eight warps would do a whole run of 32 query rows in 34.6 (64 runs) and 62.5 (128), but sum in
another order.
"""
_LOWEST = 16


@triton.jit
def _run_block_state(
    q: tl.tuple,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    page_B: tl.tensor,
    k_scale_B: tl.tensor,
    v_scale_B: tl.tensor,
    block: tl.tensor,
    stop: tl.tensor,
    end_M: tl.tensor,
    head_offset: tl.tensor,
    kv_stride_n: tl.int64,
    kv_stride_g: tl.int64,
    scale_M: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc: tl.tuple,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tuple]:
    """`blocks.block_state` for query rows with ends of their own, `stop` at most; a row may have no
    position in the block."""
    position_B = block + tl.arange(0, B)
    base_B = page_B.to(tl.int64) * kv_stride_n + (position_B % G) * kv_stride_g + head_offset
    k_BW, v_BW = load_block(k_ptr, v_ptr, base_B, position_B < stop, D, DP, PAIRED)
    seen_MB = position_B[None, :] < end_M[:, None]
    score_MB = scores(q, k_BW, SCALED, PAIRED)
    if SCALED:
        score_MB = score_MB * k_scale_B.to(tl.float32)[None, :]
    score_MB = tl.where(seen_MB, score_MB, float("-inf"))
    zero_M = tl.zeros([M], tl.float32)
    new_max_M = tl.maximum(max_M, tl.fma(tl.max(score_MB, axis=1), scale_M, zero_M))
    # A row that has seen nothing keeps a sum of 0.
    finite_max_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    base_M, unshift_M = finite_max_M, zero_M
    # 0 times infinity is NaN: a value that is not finite reaches the rows that see it alone. Of
    # codes it is the scale that is not.
    if SCALED:
        v_scale_B = v_scale_B.to(tl.float32)
        odd_B = v_scale_B != v_scale_B
        v_scale_B = tl.where(odd_B, 0.0, v_scale_B)
    else:
        odd_BW = (v_BW != v_BW) | (tl.abs(v_BW.to(tl.float32)) == float("inf"))
        odd_B = tl.max(odd_BW.to(tl.int32), axis=1) > 0
        v_BW = tl.where(odd_BW, 0.0, v_BW).to(v_BW.dtype)
    if PAIRED:
        shift_M = value_shift(tl.max(tl.where(seen_MB, v_scale_B[None, :], 0.0), axis=1))
        base_M, unshift_M = finite_max_M + shift_M, power_of_two(shift_M)
    scale_MB = tl.broadcast_to(scale_M[:, None], [M, B])
    prob_MB = tl.exp2(tl.fma(score_MB, scale_MB, tl.broadcast_to(-base_M[:, None], [M, B])))
    block_sum_M = row_sum(prob_MB, M, B)
    if PAIRED:
        block_sum_M = tl.fma(block_sum_M, unshift_M, zero_M)
    if SCALED:
        prob_MB = prob_MB * v_scale_B[None, :]
    shrink_M = tl.exp2(max_M - finite_max_M)
    sum_M = tl.fma(sum_M, shrink_M, block_sum_M)
    meets_M = tl.max((seen_MB & odd_B[None, :]).to(tl.int32), axis=1) > 0
    sum_M = tl.where(meets_M, float("nan"), sum_M)
    part_MB = prob_MB.to(q[0].dtype)
    acc = weighed(part_MB, v_BW, unshift_M, shrink_M, acc, M, DP, False, SCALED, PAIRED)
    return new_max_M, sum_M, acc


@triton.jit
def _run_kernel(
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
    out_ptr: tl.tensor,
    scale: tl.float32,
    q_stride_t: tl.int64,
    kv_stride_n: tl.int64,
    kv_stride_g: tl.int64,
    kv_stride_k: tl.int64,
    table_stride: tl.int64,
    J: tl.constexpr,
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
    PARTS: tl.constexpr,
) -> None:
    """PARTS: a program takes one split and leaves its state; else all splits in turn."""
    first, kv_head, split = tl.program_id(0).to(tl.int64) * J, tl.program_id(1), tl.program_id(2)
    home = tl.load(table_rows_ptr + first)
    first_end = tl.load(kv_len_ptr + first)
    end = first_end
    # One by one: their loads are in flight together, and a maximum over a tile would wait twice.
    for place in tl.static_range(1, J):
        own = tl.load(table_rows_ptr + first + place) == home
        end = tl.maximum(end, tl.where(own, tl.load(kv_len_ptr + first + place), 0))
    pages_ptr = table_ptr + home.to(tl.int64) * table_stride

    item_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    inside_M, row_M = item_M < J * U, first + item_M // U
    # Rows of the run that are not in use have another home.
    table_row_M = tl.load(table_rows_ptr + row_M, mask=inside_M, other=-1)
    kv_len_M = tl.load(kv_len_ptr + row_M, mask=inside_M, other=0)
    query_M = tl.load(query_start_ptr + row_M, mask=inside_M, other=0).to(tl.int64)
    live_M = inside_M & (table_row_M == home)
    kv_len_M = tl.where(live_M, kv_len_M, 0)

    head_offset_MD = (kv_head * U + item_M % U)[:, None] * D + dim_D[None, :]
    inside_D = dim_D[None, :] < D
    q_offset_MD = query_M[:, None] * q_stride_t + head_offset_MD
    q_MD = tl.load(q_ptr + q_offset_MD, mask=live_M[:, None] & inside_D, other=0.0)
    q, scale_M = as_queries(q_MD, scale, M, DP, PAIRED)
    out_offset_MD = query_M[:, None] * tl.num_programs(1) * U * D + head_offset_MD
    heads = tl.num_programs(1) * U
    slot_M = (row_M * heads + kv_head * U + item_M % U) * tl.num_programs(2) + split
    part_offset_MD = slot_M[:, None] * D + dim_D[None, :]

    size_M = split_size(kv_len_M, B, SPLITS, LEAST)
    size, largest = split_size(first_end, B, SPLITS, LEAST), split_size(end, B, SPLITS, LEAST)
    # Rows whose length asks for splits of another size, once in thousands of tokens, come second.
    for turn in range(tl.where(size == largest, 1, 2)):
        size = tl.where(turn == 0, size, largest)
        active_M = live_M & (size_M == size)
        end_M = tl.where(active_M, kv_len_M, 0)
        start = split * size if PARTS else 0
        stop = tl.minimum(start + size, end) if PARTS else end
        page_B = load_pages(pages_ptr, start, stop, G, B)
        k_scale_B, v_scale_B = load_scales(
            k_scales_ptr, v_scales_ptr, page_B, start, stop, kv_head, G, B, SCALED
        )
        max_M = tl.full([M], float("-inf"), tl.float32)
        sum_M = tl.zeros([M], tl.float32)
        acc = zeros(M, DP, PAIRED)
        run_max_M = tl.full([M], float("-inf"), tl.float32)
        run_sum_M = tl.zeros([M], tl.float32)
        run_acc = zeros(M, DP, PAIRED)
        # Blocks that every row sees whole, then the last one or two.
        whole = tl.maximum(tl.minimum(first_end, stop) // B * B, start)
        for block in range(start, whole, B):
            next_B = load_pages(pages_ptr, block + B, stop, G, B)
            max_M, sum_M, acc = block_state(
                q,
                k_ptr,
                v_ptr,
                page_B,
                k_scale_B,
                v_scale_B,
                block,
                0,
                stop,
                kv_head * kv_stride_k,
                kv_stride_n,
                kv_stride_g,
                scale_M,
                max_M,
                sum_M,
                acc,
                False,
                True,
                0,
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
                    k_scales_ptr, v_scales_ptr, page_B, block + B, stop, kv_head, G, B, SCALED
                )
            ends = ((block + B) % size == 0) | (block + B >= end)
            if not PARTS and ends:
                run_max_M, run_sum_M, run_acc = fold_split(
                    run_max_M, run_sum_M, run_acc, max_M, sum_M, acc, PAIRED
                )
                max_M = tl.full([M], float("-inf"), tl.float32)
                sum_M = tl.zeros([M], tl.float32)
                acc = zeros(M, DP, PAIRED)
        for block in range(whole, stop, B):
            max_M, sum_M, acc = _run_block_state(
                q,
                k_ptr,
                v_ptr,
                page_B,
                k_scale_B,
                v_scale_B,
                block,
                stop,
                end_M,
                kv_head * kv_stride_k,
                kv_stride_n,
                kv_stride_g,
                scale_M,
                max_M,
                sum_M,
                acc,
                M,
                D,
                DP,
                G,
                B,
                SCALED,
                PAIRED,
            )
            page_B = load_pages(pages_ptr, block + B, stop, G, B)
            if SCALED:
                k_scale_B, v_scale_B = load_scales(
                    k_scales_ptr, v_scales_ptr, page_B, block + B, stop, kv_head, G, B, SCALED
                )
            ends = ((block + B) % size == 0) | (block + B >= end)
            if not PARTS and ends:
                run_max_M, run_sum_M, run_acc = fold_split(
                    run_max_M, run_sum_M, run_acc, max_M, sum_M, acc, PAIRED
                )
                max_M = tl.full([M], float("-inf"), tl.float32)
                sum_M = tl.zeros([M], tl.float32)
                acc = zeros(M, DP, PAIRED)
        if PARTS:
            mine_M = active_M & (start < end_M)
            tl.store(
                part_ptr + part_offset_MD, in_order(acc, PAIRED), mask=mine_M[:, None] & inside_D
            )
            tl.store(state_ptr + 2 * slot_M, max_M, mask=mine_M)
            tl.store(state_ptr + 2 * slot_M + 1, sum_M, mask=mine_M)
        else:
            out_MD = in_order(run_acc, PAIRED) / tl.where(run_sum_M == 0.0, 1.0, run_sum_M)[:, None]
            mine_MD = active_M[:, None] & inside_D
            tl.store(out_ptr + out_offset_MD, out_MD.to(out_ptr.dtype.element_ty), mask=mine_MD)
    # Rows that are not in use get zeros.
    idle_M = inside_M & (table_row_M != home)
    idle_MD = idle_M[:, None] & inside_D
    nothing_MD = tl.zeros([M, DP], tl.float32)
    if PARTS:
        tl.store(part_ptr + part_offset_MD, nothing_MD, mask=idle_MD)
        tl.store(state_ptr + 2 * slot_M, tl.zeros([M], tl.float32), mask=idle_M)
        tl.store(state_ptr + 2 * slot_M + 1, tl.full([M], 1.0, tl.float32), mask=idle_M)
    else:
        tl.store(out_ptr + out_offset_MD, nothing_MD.to(out_ptr.dtype.element_ty), mask=idle_MD)


def takes_runs(call: DecodeCall, run: int, window: int | None) -> bool:
    """Whether runs of so many rows are read together."""
    narrow = call.inputs[0].element_size() == 2 and call.shape["DP"] <= 128
    return run > 1 and run * call.shape["U"] <= HIGHEST and narrow and window is None


def run_states(
    call: DecodeCall,
    run: int,
    parts: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Attend the rows of `call`, in runs of `run`.

    parts: filled with what each split leaves, as `decode.py` merges it; None attends whole rows.
    """
    height = _height(call, run)
    splits = 1 if parts is None else parts[0].shape[2]
    part, state = (call.out_THD, call.out_THD) if parts is None else parts
    shape = {name: value for name, value in call.shape.items() if name != "INDIRECT"}
    cut = {name: value for name, value in call.cut.items() if name != "WINDOW"}
    _run_kernel[(call.num_rows // run, call.num_kv_heads, splits)](
        *call.inputs,
        call.kv_len_R,
        part,
        state,
        call.out_THD,
        call.scale,
        *call.strides,
        J=run,
        M=height,
        PARTS=parts is not None,
        **shape,
        **cut,
        num_warps=4,
        num_stages=2 if parts is None else 1,
    )


def are_many(call: DecodeCall, run: int) -> bool:
    """Whether there are enough runs for reading each once to pay, and not too many for tiles that
    are too high to take a whole run."""
    programs = call.num_rows // run * call.num_kv_heads
    return programs >= RUNS_FROM and (
        _height(call, run) == _LOWEST or not takes_whole_runs(call, run)
    )


def _height(call: DecodeCall, run: int) -> int:
    """Query rows of a tile: tensor cores take 16 at least."""
    return max(triton.next_power_of_2(run * call.shape["U"]), _LOWEST)


def takes_whole_runs(call: DecodeCall, run: int) -> bool:
    """Whether a program takes all splits of a run."""
    return takes_whole_rows(call.num_rows // run, call.num_kv_heads)
