"""What the decode kernels share: how KV is cut, and the arithmetic of a block and of a split.

Shapes: M query rows of a tile (a query row is one head of one sequence), D head dim padded to
DP, G page size, B KV positions of a block, U = H / K query heads of a kv head.

A query row's result must have the same bits whichever kernel computes it, alone or in a wide
tile. So nothing here may depend on the layout that the compiler gives a tile: a matrix product
adds up each row alike however many rows there are, a maximum is a maximum in any order, and
sums of probabilities are spelled out as far as layouts differ (`row_sum`). Products that are
added to are written as fma, or the compiler would fuse some in one kernel and not in another.
Scores are kept in base 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def split_size(
    kv_len: tl.tensor, B: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr
) -> tl.tensor:
    """Positions of a split, a multiple of B. It follows from the row's own length alone.

    kv_len: positions that the row walks, from `first_block` on.
    """
    return tl.maximum(tl.cdiv(tl.cdiv(kv_len, SPLITS), B) * B, LEAST)


@triton.jit
def first_block(low: tl.tensor, B: tl.constexpr) -> tl.tensor:
    """Where a row that sees nothing before position `low` begins to walk its KV."""
    return low // B * B


@triton.jit
def lowest_seen(last: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """First position that a query at position `last` sees; WINDOW 0 is no window."""
    low = last * 0
    if WINDOW:
        low = tl.maximum(last - (WINDOW - 1), 0)
    return low


@triton.jit
def row_sum(x_MB: tl.tensor, M: tl.constexpr, B: tl.constexpr) -> tl.tensor:
    """Sum of each row in an order that is the same for every tile of 16-bit products.

    Tensor cores hand out 8 columns to four neighbouring lanes, in a tile of any height; but
    which warp has which 8 differs. Columns a multiple of 32 apart lie in one thread whenever
    up to four warps share a row: they are added first, then the 8 of a lane quad, and the
    four sums that are left, maybe of four warps, pair by pair.
    """
    eight_M48 = tl.sum(tl.reshape(x_MB, [M, B // 32, 4, 8]), axis=1)
    sum_M4 = tl.sum(eight_M48, axis=2)
    even_M2, odd_M2 = tl.split(tl.reshape(sum_M4, [M, 2, 2]))
    left_M, right_M = tl.split(even_M2 + odd_M2)
    return left_M + right_M


@triton.jit
def load_pages(
    pages_ptr: tl.tensor,
    block: tl.tensor,
    end: tl.tensor,
    G: tl.constexpr,
    B: tl.constexpr,
) -> tl.tensor:
    """Page ids of a block's positions, int32 [B].

    Loaded one block ahead of the KV that they say where to find: else the two waits add up.
    """
    position_B = block + tl.arange(0, B)
    return tl.load(pages_ptr + position_B // G, mask=position_B < end, other=0)


@triton.jit
def load_scales(
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    page_B: tl.tensor,
    block: tl.tensor,
    end: tl.tensor,
    kv_head: tl.tensor,
    G: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scales of the keys and values of a block's positions, [B] each; without SCALED nothing that
    is read. Loaded a block ahead, like page ids. The second axis of the grid is that of kv heads.
    """
    k_scale_B, v_scale_B = page_B, page_B
    if SCALED:
        position_B = block + tl.arange(0, B)
        head_B = page_B.to(tl.int64) * tl.num_programs(1) + kv_head
        offset_B = head_B * G + position_B % G
        k_scale_B = tl.load(k_scales_ptr + offset_B, mask=position_B < end, other=0.0)
        v_scale_B = tl.load(v_scales_ptr + offset_B, mask=position_B < end, other=0.0)
    return k_scale_B, v_scale_B


@triton.jit
def decoded(codes: tl.tensor, SCALED: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes as elements of a product, exactly; elements as they are. By way of float32, since the
    one instruction from float16 to bfloat16 is slow."""
    if SCALED:
        codes = codes.to(tl.float16).to(tl.float32).to(DTYPE)
    return codes


@triton.jit
def block_state(
    q_MD: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    page_B: tl.tensor,
    k_scale_B: tl.tensor,
    v_scale_B: tl.tensor,
    block: tl.tensor,
    low: tl.tensor,
    end: tl.tensor,
    head_offset: tl.tensor,
    kv_stride_n: tl.int64,
    kv_stride_g: tl.int64,
    scale: tl.float32,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc_MD: tl.tensor,
    FIRST: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block of KV into the running (max, sum, weighted sum) of a split; `scale` > 0.

    SCALED: pages hold codes, whose scales multiply the score and the probability of their position.
    Positions [low, end) count, of which the block has one at least; without a WINDOW, low is
    0. FIRST: it is the first of its split. FULL: `end` is no nearer than the block's end. Both
    save work and change no bit.
    """
    dim_D = tl.arange(0, DP)
    position_B = block + tl.arange(0, B)
    seen_B = tl.full([B], True, tl.int1) if FULL else position_B < end
    if WINDOW:
        seen_B = seen_B & (position_B >= low)
    base_B = page_B.to(tl.int64) * kv_stride_n + (position_B % G) * kv_stride_g + head_offset
    offset_BD = base_B[:, None] + dim_D[None, :]
    inside_BD = seen_B[:, None] & (dim_D[None, :] < D)
    k_BD = tl.load(k_ptr + offset_BD, mask=inside_BD, other=0.0)
    v_BD = tl.load(v_ptr + offset_BD, mask=inside_BD, other=0.0)
    score_MB = tl.dot(q_MD, tl.trans(decoded(k_BD, SCALED, q_MD.dtype)), input_precision="ieee")
    if SCALED:
        score_MB = score_MB * k_scale_B.to(tl.float32)[None, :]
    if not FULL:
        score_MB = tl.where(seen_B[None, :], score_MB, float("-inf"))
    scale_M, zero_M = tl.full([M], 1.0, tl.float32) * scale, tl.zeros([M], tl.float32)
    # As a plain product it would be fused with the subtractions that follow where FIRST.
    new_max_M = tl.fma(tl.max(score_MB, axis=1), scale_M, zero_M)
    if not FIRST:
        new_max_M = tl.maximum(max_M, new_max_M)
    scale_MB = tl.full([M, B], 1.0, tl.float32) * scale
    prob_MB = tl.exp2(tl.fma(score_MB, scale_MB, tl.broadcast_to(-new_max_M[:, None], [M, B])))
    block_sum_M = row_sum(prob_MB, M, B)
    if SCALED:
        # What is not seen may have any scale, NaN among them.
        prob_MB = prob_MB * tl.where(seen_B, v_scale_B.to(tl.float32), 0.0)[None, :]
    part_MB, v_BD = prob_MB.to(q_MD.dtype), decoded(v_BD, SCALED, q_MD.dtype)
    if FIRST:
        return new_max_M, block_sum_M, tl.dot(part_MB, v_BD, input_precision="ieee")
    shrink_M = tl.exp2(max_M - new_max_M)
    sum_M = tl.fma(sum_M, shrink_M, block_sum_M)
    acc_MD = tl.dot(part_MB, v_BD, acc_MD * shrink_M[:, None], input_precision="ieee")
    return new_max_M, sum_M, acc_MD


@triton.jit
def fold_split(
    run_max_M: tl.tensor,
    run_sum_M: tl.tensor,
    run_acc_MD: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc_MD: tl.tensor,
    M: tl.constexpr,
    DP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A row's next split into the state that the splits before it left."""
    new_max_M = tl.maximum(run_max_M, max_M)
    shrink_M, share_M = tl.exp2(run_max_M - new_max_M), tl.exp2(max_M - new_max_M)
    run_sum_M = tl.fma(run_sum_M, shrink_M, sum_M * share_M)
    share_MD = tl.broadcast_to(share_M[:, None], [M, DP])
    run_acc_MD = tl.fma(acc_MD, share_MD, run_acc_MD * shrink_M[:, None])
    return new_max_M, run_sum_M, run_acc_MD
