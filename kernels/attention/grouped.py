"""Decode attention over KV that several rows share: read once for all rows of a tile.

Samples of one prompt hold the same pages at the front of their page tables. A tile packs the
query heads of several such rows into one matrix product, so their shared KV is read once
(Juravsky et al., Hydragen, arXiv 2402.05099; FlashInfer's cascade inference) and what it gives
each row is stored as the state of that row's own loop over splits: `whole_kernel` goes on from
there, with the same bits as if it had begun at position 0.

Shapes: R rows, H query heads, K kv heads, U = H / K, M query rows of a tile, T tiles, D head
dim padded to DP, N pages, G page size, B KV positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.attention.blocks import block_state, fold_split, load_pages, load_scales
from kernels.attention.call import DecodeCall
from kernels.attention.heads import as_queries, in_order, zeros
from kernels.attention.tiles import MIN_SPLIT, TILE_ROWS, SharedTiles

HIGHEST = 128


@dataclass(frozen=True)
class Launch:
    """height: query rows of a program, a power of two; more take more registers."""

    height: int
    num_warps: int
    num_stages: int


@triton.jit
def shared_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    state_acc_ptr: tl.tensor,
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
    LEAST: tl.constexpr,
    INDIRECT: tl.constexpr,
) -> None:
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tile_ptr + 3 * tile).to(tl.int64)
    num_rows = tl.load(tile_ptr + 3 * tile + 1)
    tokens = tl.load(tile_ptr + 3 * tile + 2)
    # Where a tile's heads are more than M, several programs take its rows in turn.
    passed = tl.program_id(2) * (M // U)
    if (tokens == 0) | (passed >= num_rows):
        return
    table_row = tl.load(table_rows_ptr + first).to(tl.int64) if INDIRECT else first
    pages_ptr = table_ptr + table_row * table_stride

    page_B = load_pages(pages_ptr, 0, tokens, G, B)
    k_scale_B, v_scale_B = load_scales(
        k_scales_ptr, v_scales_ptr, page_B, 0, tokens, kv_head, G, B, SCALED
    )
    item_M, dim_D = tl.arange(0, M), tl.arange(0, DP)
    row_M, head_M = first + passed + item_M // U, kv_head * U + item_M % U
    valid_M = item_M < tl.minimum(num_rows - passed, M // U) * U
    inside_MD = valid_M[:, None] & (dim_D[None, :] < D)
    query_M = tl.load(query_start_ptr + row_M, mask=valid_M, other=0).to(tl.int64)
    q_offset_MD = query_M[:, None] * q_stride_t + head_M[:, None] * D + dim_D[None, :]
    q_MD = tl.load(q_ptr + q_offset_MD, mask=inside_MD, other=0.0)
    q, scale_M = as_queries(q_MD, scale, M, DP, PAIRED)
    max_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc = zeros(M, DP, PAIRED)
    run_max_M = tl.full([M], float("-inf"), tl.float32)
    run_sum_M = tl.zeros([M], tl.float32)
    run_acc = zeros(M, DP, PAIRED)
    for block in range(0, tokens, B):
        next_B = load_pages(pages_ptr, block + B, tokens, G, B)
        max_M, sum_M, acc = block_state(
            q,
            k_ptr,
            v_ptr,
            page_B,
            k_scale_B,
            v_scale_B,
            block,
            0,
            tokens,
            kv_head * kv_stride_k,
            kv_stride_n,
            kv_stride_g,
            scale_M,
            max_M,
            sum_M,
            acc,
            B == LEAST,
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
                k_scales_ptr, v_scales_ptr, page_B, block + B, tokens, kv_head, G, B, SCALED
            )
        if (B == LEAST) or ((block + B) % LEAST == 0):
            run_max_M, run_sum_M, run_acc = fold_split(
                run_max_M, run_sum_M, run_acc, max_M, sum_M, acc, PAIRED
            )
            max_M = tl.full([M], float("-inf"), tl.float32)
            sum_M = tl.zeros([M], tl.float32)
            acc = zeros(M, DP, PAIRED)
    slot_M = row_M * tl.num_programs(1) * U + head_M
    tl.store(
        state_acc_ptr + slot_M[:, None] * D + dim_D[None, :],
        in_order(run_acc, PAIRED),
        mask=inside_MD,
    )
    tl.store(state_ptr + 2 * slot_M, run_max_M, mask=valid_M)
    tl.store(state_ptr + 2 * slot_M + 1, run_sum_M, mask=valid_M)


def choose_launch(group: int, *, wide: bool, scaled: bool = False) -> Launch:
    """For `group` query heads of a kv head: what was fastest on an H100 at head dim 128.

    wide: elements of 32 bits or a head dim above 128, which leave registers for few rows. Then
    nothing is gained, and a tile is as high as that of one row. scaled: fp8 pages, whose decoding
    takes registers too: as compiled for a Hopper GPU, 8 warps spill 400 bytes a thread and read
    values byte by byte; blocks one at a time took 23.8 us, two 24.2 and three 25.5 (64 tiles of 16
    rows, 12 query heads on 2, 512 tokens).
    """
    least = max(triton.next_power_of_2(group), 16)
    highest = max(HIGHEST // 2, least) if scaled else HIGHEST
    height = max(least, min(triton.next_power_of_2(TILE_ROWS * group), highest))
    if wide or height < 64:
        return Launch(least if wide else height, num_warps=4, num_stages=2)
    num_warps = 4 if height < HIGHEST else 8
    return Launch(height, num_warps, num_stages=1 if scaled else 3)


def shared_states(
    call: DecodeCall, tiles: SharedTiles, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of each row of a tile after its shared tokens.

    Returns the unnormalised weighted sum of values, float32 [R, H, D], and (maximum, sum) of
    the scores, float32 [R, H, 2]; rows without a tile are left unwritten.
    """
    q_THD, group = call.inputs[0], call.shape["U"]
    if launch is None:
        wide, scaled = call.shape["B"] < MIN_SPLIT, bool(call.shape["SCALED"])
        launch = choose_launch(group, wide=wide, scaled=scaled)
    acc_RHD = q_THD.new_empty(call.num_rows, *q_THD.shape[1:], dtype=torch.float32)
    state_RH2 = acc_RHD.new_empty(*acc_RHD.shape[:2], 2)
    passes = triton.cdiv(TILE_ROWS, launch.height // group)
    shared_kernel[(tiles.tile_T3.shape[0], call.num_kv_heads, passes)](
        *call.inputs,
        tiles.tile_T3,
        acc_RHD,
        state_RH2,
        call.scale,
        *call.strides,
        **call.shape,
        LEAST=MIN_SPLIT,
        M=launch.height,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return acc_RHD, state_RH2
