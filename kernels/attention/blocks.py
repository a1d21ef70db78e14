"""What the decode kernels share: how KV is cut, and the arithmetic of a block and of a split.

Shapes: M query rows of a tile (a query row is one head of one sequence), D head dim padded to
DP, G page size, B KV positions of a block, U = H / K query heads of a kv head; `heads` and W as in
`heads.py`.

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

from kernels.attention.heads import even_and_odd, exponent_of, held, power_of_two

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
def load_block(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    base_B: tl.tensor,
    inside_B: tl.tensor,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What pages hold of keys and values of a block's positions, [B, W] each; zeros where not
    inside."""
    width: tl.constexpr = DP // 2 if PAIRED else DP
    used: tl.constexpr = D // 2 if PAIRED else D
    dim_W = tl.arange(0, width)
    inside_BW = inside_B[:, None] & (dim_W[None, :] < used)
    offset_BW = base_B[:, None] + dim_W[None, :]
    if PAIRED:
        # Values first: keys are waited for as soon as they are asked for, see `held`.
        v_BW = tl.load(v_ptr + offset_BW, mask=inside_BW, other=0.0)
        k_BW = tl.load(k_ptr + offset_BW, mask=inside_BW, other=0.0)
    else:
        k_BW = tl.load(k_ptr + offset_BW, mask=inside_BW, other=0.0)
        v_BW = tl.load(v_ptr + offset_BW, mask=inside_BW, other=0.0)
    return k_BW, v_BW


@triton.jit
def scores(q: tl.tuple, k_BW: tl.tensor, SCALED: tl.constexpr, PAIRED: tl.constexpr) -> tl.tensor:
    """Products of queries with what pages hold of keys, [M, B]."""
    if PAIRED:
        even_BW, odd_BW = even_and_odd(k_BW)
        even_MB = tl.dot(q[0], tl.trans(even_BW))
        return tl.dot(q[1], tl.trans(odd_BW), even_MB)
    else:
        k_BW = decoded(k_BW, SCALED, q[0].dtype)
        return tl.dot(q[0], tl.trans(k_BW), input_precision="ieee")


@triton.jit
def value_shift(largest: tl.tensor) -> tl.tensor:
    """How probabilities are shifted before values' scales multiply them, PAIRED: times 2**-shift
    they are at most 2**13, and what is below 2**-24, the least that float16 has, is lost.

    largest: the largest of the scales, of positions that a row sees in the block, 0 if none.
    """
    return exponent_of(largest, -107) - 12


@triton.jit
def weighed(
    part_MB: tl.tensor,
    v_BW: tl.tensor,
    unshift_M: tl.tensor,
    shrink_M: tl.tensor,
    acc: tl.tuple,
    M: tl.constexpr,
    DP: tl.constexpr,
    FIRST: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tuple:
    """Weighted sums with a block's: acc * shrink + part @ values * unshift; FIRST without acc."""
    if PAIRED:
        even_BW, odd_BW = even_and_odd(held(v_BW))
        unshift_MW = tl.broadcast_to(unshift_M[:, None], [M, DP // 2])
        before = (tl.zeros([M, DP // 2], tl.float32), tl.zeros([M, DP // 2], tl.float32))
        if not FIRST:
            before = (acc[0] * shrink_M[:, None], acc[1] * shrink_M[:, None])
        even_MW = tl.fma(tl.dot(part_MB, even_BW), unshift_MW, before[0])
        odd_MW = tl.fma(tl.dot(part_MB, odd_BW), unshift_MW, before[1])
        return (even_MW, odd_MW)
    elif FIRST:
        v_BW = decoded(v_BW, SCALED, part_MB.dtype)
        return (tl.dot(part_MB, v_BW, input_precision="ieee"),)
    else:
        v_BW = decoded(v_BW, SCALED, part_MB.dtype)
        return (tl.dot(part_MB, v_BW, acc[0] * shrink_M[:, None], input_precision="ieee"),)


@triton.jit
def block_state(
    q: tl.tuple,
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
    scale_M: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc: tl.tuple,
    FIRST: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tuple]:
    """One block of KV into the running (max, sum, weighted sum) of a split; scales of rows > 0.

    q, scale_M: of `heads.as_queries`. acc: heads, float32.
    SCALED: pages hold codes, whose scales multiply the score and the probability of their position.
    Positions [low, end) count, of which the block has one at least; without a WINDOW, low is
    0. FIRST: it is the first of its split. FULL: `end` is no nearer than the block's end. Both
    save work and change no bit.
    """
    position_B = block + tl.arange(0, B)
    seen_B = tl.full([B], True, tl.int1) if FULL else position_B < end
    if WINDOW:
        seen_B = seen_B & (position_B >= low)
    base_B = page_B.to(tl.int64) * kv_stride_n + (position_B % G) * kv_stride_g + head_offset
    k_BW, v_BW = load_block(k_ptr, v_ptr, base_B, seen_B, D, DP, PAIRED)
    score_MB = scores(q, k_BW, SCALED, PAIRED)
    if SCALED:
        score_MB = score_MB * k_scale_B.to(tl.float32)[None, :]
    if not FULL:
        score_MB = tl.where(seen_B[None, :], score_MB, float("-inf"))
    zero_M = tl.zeros([M], tl.float32)
    # As a plain product it would be fused with the subtractions that follow where FIRST.
    new_max_M = tl.fma(tl.max(score_MB, axis=1), scale_M, zero_M)
    if not FIRST:
        new_max_M = tl.maximum(max_M, new_max_M)
    base_M, unshift_M = new_max_M, zero_M
    if SCALED:
        # What is not seen may have any scale, NaN among them.
        v_scale_B = tl.where(seen_B, v_scale_B.to(tl.float32), 0.0)
    if PAIRED:
        shift = value_shift(tl.max(tl.where(v_scale_B == v_scale_B, v_scale_B, 0.0)))
        base_M, unshift_M = new_max_M + shift, zero_M + power_of_two(shift)
    scale_MB = tl.broadcast_to(scale_M[:, None], [M, B])
    prob_MB = tl.exp2(tl.fma(score_MB, scale_MB, tl.broadcast_to(-base_M[:, None], [M, B])))
    block_sum_M = row_sum(prob_MB, M, B)
    if PAIRED:
        block_sum_M = tl.fma(block_sum_M, unshift_M, zero_M)
    if SCALED:
        prob_MB = prob_MB * v_scale_B[None, :]
    part_MB = prob_MB.to(q[0].dtype)
    shrink_M = zero_M
    if FIRST:
        sum_M = block_sum_M
    else:
        shrink_M = tl.exp2(max_M - new_max_M)
        sum_M = tl.fma(sum_M, shrink_M, block_sum_M)
    acc = weighed(part_MB, v_BW, unshift_M, shrink_M, acc, M, DP, FIRST, SCALED, PAIRED)
    return new_max_M, sum_M, acc


@triton.jit
def fold_split(
    run_max_M: tl.tensor,
    run_sum_M: tl.tensor,
    run_acc: tl.tuple,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc: tl.tuple,
    PAIRED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tuple]:
    """A row's next split into the state that the splits before it left."""
    new_max_M = tl.maximum(run_max_M, max_M)
    shrink_M, share_M = tl.exp2(run_max_M - new_max_M), tl.exp2(max_M - new_max_M)
    run_sum_M = tl.fma(run_sum_M, shrink_M, sum_M * share_M)
    if PAIRED:
        even_MW = _mixed(run_acc[0], shrink_M, acc[0], share_M)
        odd_MW = _mixed(run_acc[1], shrink_M, acc[1], share_M)
        return new_max_M, run_sum_M, (even_MW, odd_MW)
    else:
        return new_max_M, run_sum_M, (_mixed(run_acc[0], shrink_M, acc[0], share_M),)


@triton.jit
def _mixed(
    run_acc_MW: tl.tensor, shrink_M: tl.tensor, acc_MW: tl.tensor, share_M: tl.tensor
) -> tl.tensor:
    share_MW = tl.broadcast_to(share_M[:, None], acc_MW.shape)
    return tl.fma(acc_MW, share_MW, run_acc_MW * shrink_M[:, None])
