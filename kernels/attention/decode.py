"""Decode attention on GPU: rows of one query, their KV in splits whose results are merged.

Shapes: R rows, H query heads, K kv heads, U = H / K heads of a group padded to M, D head dim
padded to DP, N pages, G page size, P page columns, B KV positions of a block, Z splits.

How a row is split follows from its own KV length alone, so that its result does not depend
on the batch. A batch that fills the GPU by its rows computes the splits of a row one after
the other in one program, by the same arithmetic and so to the same bits; a smaller one gives
every split a program of its own. Scores are kept in base 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_SPLITS = 32
MIN_SPLIT = 128
WHOLE_FROM = 128
"""Rows times kv heads from which a program takes a whole row: about one for each processor."""
LOG2_E = 1.4426950408889634


@triton.jit
def _split_size(
    kv_len: tl.tensor, B: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr
) -> tl.tensor:
    return tl.maximum(tl.cdiv(tl.cdiv(kv_len, SPLITS), B) * B, LEAST)


@triton.jit
def _block_state(
    q_MD: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    block: tl.tensor,
    end: tl.tensor,
    head_offset: tl.tensor,
    kv_stride_n: tl.int64,
    kv_stride_g: tl.int64,
    scale: tl.float32,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc_MD: tl.tensor,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block of KV into the running (max, sum, weighted sum) of a split."""
    dim_D = tl.arange(0, DP)
    position_B = block + tl.arange(0, B)
    seen_B = position_B < end
    page_B = tl.load(pages_ptr + position_B // G, mask=seen_B, other=0).to(tl.int64)
    base_B = page_B * kv_stride_n + (position_B % G) * kv_stride_g + head_offset
    offset_BD = base_B[:, None] + dim_D[None, :]
    inside_BD = seen_B[:, None] & (dim_D[None, :] < D)
    k_BD = tl.load(k_ptr + offset_BD, mask=inside_BD, other=0.0)
    v_BD = tl.load(v_ptr + offset_BD, mask=inside_BD, other=0.0)
    score_MB = tl.dot(q_MD, tl.trans(k_BD), input_precision="ieee") * scale
    score_MB = tl.where(seen_B[None, :], score_MB, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.max(score_MB, axis=1))
    shrink_M = tl.exp2(max_M - new_max_M)
    prob_MB = tl.exp2(score_MB - new_max_M[:, None])
    sum_M = tl.fma(sum_M, shrink_M, tl.sum(prob_MB, axis=1))
    acc_MD = acc_MD * shrink_M[:, None]
    acc_MD = tl.dot(prob_MB.to(v_BD.dtype), v_BD, acc_MD, input_precision="ieee")
    return new_max_M, sum_M, acc_MD


@triton.jit
def _decode_split_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    part_ptr: tl.tensor,
    lse_ptr: tl.tensor,
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
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    INDIRECT: tl.constexpr,
) -> None:
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    query = tl.load(query_start_ptr + row).to(tl.int64)
    if tl.load(query_start_ptr + row + 1) - query != 1:
        return
    kv_len = tl.load(kv_len_ptr + row)
    size = _split_size(kv_len, B, SPLITS, LEAST)
    begin = split * size
    if begin >= kv_len:
        return
    end = tl.minimum(begin + size, kv_len)
    table_row = tl.load(table_rows_ptr + row).to(tl.int64) if INDIRECT else row
    pages_ptr = table_ptr + table_row * table_stride

    head_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    inside_MD = (head_M[:, None] < U) & (dim_D[None, :] < D)
    head_offset_MD = (kv_head * U + head_M[:, None]) * D + dim_D[None, :]
    q_MD = tl.load(q_ptr + query * q_stride_t + head_offset_MD, mask=inside_MD, other=0.0)
    max_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc_MD = tl.zeros([M, DP], tl.float32)
    for block in range(begin, end, B):
        max_M, sum_M, acc_MD = _block_state(
            q_MD,
            k_ptr,
            v_ptr,
            pages_ptr,
            block,
            end,
            kv_head * kv_stride_k,
            kv_stride_n,
            kv_stride_g,
            scale,
            max_M,
            sum_M,
            acc_MD,
            D,
            DP,
            G,
            B,
        )
    slot_M = (row * tl.num_programs(1) * U + kv_head * U + head_M) * tl.num_programs(2) + split
    part_offset_MD = slot_M[:, None] * D + dim_D[None, :]
    tl.store(part_ptr + part_offset_MD, acc_MD / sum_M[:, None], mask=inside_MD)
    tl.store(lse_ptr + slot_M, max_M + tl.log2(sum_M), mask=head_M < U)


@triton.jit
def _decode_merge_kernel(
    part_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    kv_len_ptr: tl.tensor,
    out_ptr: tl.tensor,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    Z: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = tl.load(query_start_ptr + row).to(tl.int64)
    if tl.load(query_start_ptr + row + 1) - query != 1:
        return
    kv_len = tl.load(kv_len_ptr + row)
    used = tl.cdiv(kv_len, _split_size(kv_len, B, SPLITS, LEAST))
    slot = (row * tl.num_programs(1) + head) * Z
    dim_D = tl.arange(0, DP)
    lse_max, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    acc_D = tl.zeros([DP], tl.float32)
    for split in tl.static_range(Z):
        # Loads of all splits are in flight together: none depends on the fold.
        lse = tl.load(lse_ptr + slot + split, mask=split < used, other=float("-inf"))
        inside_D = (dim_D < D) & (split < used)
        part_D = tl.load(part_ptr + (slot + split) * D + dim_D, mask=inside_D, other=0.0)
        new_max = tl.maximum(lse_max, lse)
        shrink = tl.where(split < used, tl.exp2(lse_max - new_max), 1.0)
        share = tl.where(split < used, tl.exp2(lse - new_max), 0.0)
        total = tl.fma(total, shrink, share)
        acc_D = tl.fma(part_D, share, acc_D * shrink)
        lse_max = new_max
    # A row without KV (padding of a captured batch) has no parts; it gets zeros.
    mixed_D = acc_D / tl.where(total == 0.0, 1.0, total)
    out_offset_D = (query * tl.num_programs(1) + head) * D + dim_D
    tl.store(out_ptr + out_offset_D, mixed_D.to(out_ptr.dtype.element_ty), mask=dim_D < D)


@triton.jit
def _decode_whole_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
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
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    INDIRECT: tl.constexpr,
) -> None:
    """All splits of a row and kv head in turn, folded as the merge kernel folds them."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = tl.load(query_start_ptr + row).to(tl.int64)
    if tl.load(query_start_ptr + row + 1) - query != 1:
        return
    kv_len = tl.load(kv_len_ptr + row)
    size = _split_size(kv_len, B, SPLITS, LEAST)
    table_row = tl.load(table_rows_ptr + row).to(tl.int64) if INDIRECT else row
    pages_ptr = table_ptr + table_row * table_stride

    head_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    inside_MD = (head_M[:, None] < U) & (dim_D[None, :] < D)
    head_offset_MD = (kv_head * U + head_M[:, None]) * D + dim_D[None, :]
    q_MD = tl.load(q_ptr + query * q_stride_t + head_offset_MD, mask=inside_MD, other=0.0)
    max_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc_MD = tl.zeros([M, DP], tl.float32)
    lse_max_M = tl.full([M], float("-inf"), tl.float32)
    total_M = tl.zeros([M], tl.float32)
    mixed_MD = tl.zeros([M, DP], tl.float32)
    # One loop over blocks, so that loads run ahead also where a split ends.
    for block in range(0, kv_len, B):
        max_M, sum_M, acc_MD = _block_state(
            q_MD,
            k_ptr,
            v_ptr,
            pages_ptr,
            block,
            kv_len,
            kv_head * kv_stride_k,
            kv_stride_n,
            kv_stride_g,
            scale,
            max_M,
            sum_M,
            acc_MD,
            D,
            DP,
            G,
            B,
        )
        if ((block + B) % size == 0) | (block + B >= kv_len):
            lse_M = max_M + tl.log2(sum_M)
            new_max_M = tl.maximum(lse_max_M, lse_M)
            shrink_M = tl.exp2(lse_max_M - new_max_M)
            share_M = tl.exp2(lse_M - new_max_M)
            total_M = tl.fma(total_M, shrink_M, share_M)
            part_MD = acc_MD / sum_M[:, None]
            mixed_MD = tl.fma(
                part_MD,
                tl.broadcast_to(share_M[:, None], [M, DP]),
                mixed_MD * shrink_M[:, None],
            )
            lse_max_M = new_max_M
            max_M = tl.full([M], float("-inf"), tl.float32)
            sum_M = tl.zeros([M], tl.float32)
            acc_MD = tl.zeros([M, DP], tl.float32)
    mixed_MD = mixed_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    out_offset_MD = query * tl.num_programs(1) * U * D + head_offset_MD
    tl.store(out_ptr + out_offset_MD, mixed_MD.to(out_ptr.dtype.element_ty), mask=inside_MD)


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
    whole: bool | None = None,
) -> None:
    """Fill `out_THD` for the rows that have exactly one query; other rows are left alone.

    table_rows_R, max_kv_len: see `kernels.attention.paged_attention`.
    whole: one program takes all splits of a row, in place of one for each and a merge; the
    result is the same. None does so when the rows alone fill the GPU.
    """
    num_rows = kv_len_R.shape[0]
    num_heads, head_dim = q_THD.shape[1:]
    page_size, num_kv_heads = k_pages_NGKD.shape[1:3]
    group, padded_dim = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    wide = q_THD.dtype == torch.float32 or padded_dim > 128
    block = 32 if wide else 128
    shape = {"D": head_dim, "DP": padded_dim, "B": block, "SPLITS": MAX_SPLITS, "LEAST": MIN_SPLIT}
    layout = {"U": group, "M": max(triton.next_power_of_2(group), 16), "G": page_size}
    launch = {"num_warps": 4, "num_stages": 2}
    rows_R = kv_len_R if table_rows_R is None else table_rows_R
    pages = (k_pages_NGKD, v_pages_NGKD, page_table_RP, rows_R)
    inputs = (q_THD, *pages, query_start_R1, kv_len_R)
    strides = (q_THD.stride(0), *k_pages_NGKD.stride()[:3], page_table_RP.stride(0))
    options = {**shape, **layout, "INDIRECT": table_rows_R is not None, **launch}
    if num_rows * num_kv_heads >= WHOLE_FROM if whole is None else whole:
        grid = (num_rows, num_kv_heads)
        _decode_whole_kernel[grid](*inputs, out_THD, scale * LOG2_E, *strides, **options)
        return
    longest = page_table_RP.shape[1] * page_size if max_kv_len is None else max_kv_len
    splits = max(min(MAX_SPLITS, triton.cdiv(longest, MIN_SPLIT)), 1)
    part_RHZD = q_THD.new_empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32)
    lse_RHZ = part_RHZD.new_empty(num_rows, num_heads, splits)
    _decode_split_kernel[(num_rows, num_kv_heads, splits)](
        *inputs, part_RHZD, lse_RHZ, scale * LOG2_E, *strides, **options
    )
    _decode_merge_kernel[(num_rows, num_heads)](
        part_RHZD, lse_RHZ, query_start_R1, kv_len_R, out_THD, **shape, Z=splits, num_warps=1
    )
