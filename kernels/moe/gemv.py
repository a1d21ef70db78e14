"""Products of pairs of a token and an expert, each by itself: for few tokens.

Bound by the bandwidth of the weights. Programs of the same features follow each other, so that
pairs which share an expert read it from memory once. What a pair gets does not depend on the pairs
beside it, to the bit.

O output features of a program, I inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear.epilogue import gate
from kernels.moe.combine import added_to, weighted


@triton.jit
def _product(
    x_1I: tl.tensor,
    weight_ptr: tl.tensor,
    feature_O1: tl.tensor,
    input_1I: tl.tensor,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> tl.tensor:
    """float32 [O]."""
    pointers_OI = weight_ptr + feature_O1 * IN + input_1I
    if OUT % BLOCK_O == 0 and IN == BLOCK_I:
        weight_OI = tl.load(pointers_OI)
    else:
        weight_OI = tl.load(pointers_OI, mask=(feature_O1 < OUT) & (input_1I < IN), other=0.0)
    return tl.sum(x_1I * weight_OI.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["first_slot"])
def pair_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.int64,
    first_slot: tl.int32,
    SLOTS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    UP: tl.constexpr,
) -> None:
    """[pairs, OUT]. UP: from the row of a token, by gate and up; else from the row of the pair, by
    down. Rows of pairs that no slot holds are not written."""
    pair = tl.program_id(0)
    expert = tl.load(ids_ptr + pair)
    slot = expert - first_slot
    if (expert < 0) | (slot < 0) | (slot >= SLOTS):
        return
    row = pair // TOP_K if UP else pair
    input_1I = tl.arange(0, BLOCK_I)[None, :]
    x_1I = tl.load(x_ptr + row * x_stride + input_1I, mask=input_1I < IN, other=0.0).to(tl.float32)
    feature_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    feature_O1 = feature_O[:, None]
    weight_ptr += slot.to(tl.int64) * ((2 * OUT if UP else OUT) * IN)
    out_O = _product(x_1I, weight_ptr, feature_O1, input_1I, OUT, IN, BLOCK_O, BLOCK_I)
    if UP:
        weight_ptr += OUT * IN
        up_O = _product(x_1I, weight_ptr, feature_O1, input_1I, OUT, IN, BLOCK_O, BLOCK_I)
        out_O = gate(out_O, up_O, out_ptr.dtype.element_ty)
    out_O = out_O.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair.to(tl.int64) * OUT + feature_O, out_O, mask=feature_O < OUT)


@triton.jit(do_not_specialize=["first_slot"])
def combined_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    added_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    added_stride: tl.int64,
    residual_stride: tl.int64,
    first_slot: tl.int32,
    SLOTS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TOP_K: tl.constexpr,
    ADDED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """down of `pair_kernel` and then `combine_kernel`, to the bit: a few features of one token over
    all of its experts, whose weights are in flight together."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    feature_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    input_1I = tl.arange(0, BLOCK_I)[None, :]
    sum_O = tl.zeros((BLOCK_O,), tl.float32)
    for place in tl.static_range(TOP_K):
        pair = row * TOP_K + place
        expert = tl.load(ids_ptr + pair)
        slot = expert - first_slot
        held = (expert >= 0) & (slot >= 0) & (slot < SLOTS)
        inside_1I = (input_1I < IN) & held
        x_1I = tl.load(x_ptr + pair * IN + input_1I, mask=inside_1I, other=0.0).to(tl.float32)
        offset_OI = feature_O[:, None] * IN + input_1I
        inside_OI = (feature_O[:, None] < OUT) & inside_1I
        slot_ptr = weight_ptr + slot.to(tl.int64) * (OUT * IN)
        weight_OI = tl.load(slot_ptr + offset_OI, mask=inside_OI, other=0.0)
        down_O = tl.sum(x_1I * weight_OI.to(tl.float32), axis=1).to(dtype)
        weight = tl.load(weights_ptr + pair, mask=held, other=0.0)
        sum_O += weighted(down_O, weight)
    inside_O = feature_O < OUT
    out_O = added_to(
        sum_O.to(dtype),
        added_ptr + row * added_stride + feature_O,
        residual_ptr + row * residual_stride + feature_O,
        inside_O,
        ADDED,
        RESIDUAL,
    )
    tl.store(out_ptr + row * OUT + feature_O, out_O, mask=inside_O)
