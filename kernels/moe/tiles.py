"""Products of sorted pairs on tensor cores: a tile of an expert's features times some of its pairs.

The weight is the first operand: its features fill the 64 rows that a tensor core's instruction of
Hopper takes, where the few pairs of an expert would not, and pairs are the second one's columns. A
program is of one tile; programs of its features follow each other. What a pair gets does not depend
on the pairs of its tile.

O output features of a tile, I inputs of a pass, P pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear.epilogue import gate


@triton.jit
def _weights(
    weight_ptr: tl.tensor,
    feature_O: tl.tensor,
    input_I: tl.tensor,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> tl.tensor:
    pointers_OI = weight_ptr + feature_O[:, None] * IN + input_I[None, :]
    if OUT % BLOCK_O == 0 and IN % BLOCK_I == 0:
        return tl.load(pointers_OI)
    inside_OI = (feature_O[:, None] < OUT) & (input_I[None, :] < IN)
    return tl.load(pointers_OI, mask=inside_OI, other=0.0)


@triton.jit
def tiles_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sorted_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.int64,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    UP: tl.constexpr,
) -> None:
    """UP: from rows of tokens, by gate and up, to rows in sorted order; else from those, by down,
    to rows of pairs. Rows of pairs that no slot holds are not written."""
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    slot = tl.load(tile_ptr)
    if slot < 0:
        return
    place_P = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_P)
    inside_P = place_P < tl.load(tile_ptr + 2)
    pair_P = tl.load(sorted_ptr + place_P, mask=inside_P, other=0)
    if UP:
        x_row_P, out_row_P = pair_P // TOP_K, place_P
    else:
        x_row_P, out_row_P = place_P, pair_P
    feature_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_ptr += slot.to(tl.int64) * ((2 * OUT if UP else OUT) * IN)
    x_1P = x_ptr + x_row_P.to(tl.int64)[None, :] * x_stride
    sum_OP = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    up_sum_OP = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for start in tl.range(0, IN, BLOCK_I, num_stages=STAGES):
        input_I = start + tl.arange(0, BLOCK_I)
        inside_IP = inside_P[None, :] & (input_I[:, None] < IN)
        x_IP = tl.load(x_1P + input_I[:, None], mask=inside_IP, other=0.0)
        weight_OI = _weights(weight_ptr, feature_O, input_I, OUT, IN, BLOCK_O, BLOCK_I)
        sum_OP = tl.dot(weight_OI, x_IP, sum_OP, input_precision="ieee")
        if UP:
            up_ptr = weight_ptr + OUT * IN
            up_OI = _weights(up_ptr, feature_O, input_I, OUT, IN, BLOCK_O, BLOCK_I)
            up_sum_OP = tl.dot(up_OI, x_IP, up_sum_OP, input_precision="ieee")
    if UP:
        sum_OP = gate(sum_OP, up_sum_OP, out_ptr.dtype.element_ty)
    out_pointers_OP = out_ptr + out_row_P.to(tl.int64)[None, :] * OUT + feature_O[:, None]
    inside_OP = inside_P[None, :] & (feature_O[:, None] < OUT)
    tl.store(out_pointers_OP, sum_OP.to(out_ptr.dtype.element_ty), mask=inside_OP)
