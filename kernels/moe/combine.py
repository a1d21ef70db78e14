"""The sum of a token's experts, weighed, in the order of their ids; then what else is added.

H hidden width of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weighted(down_H: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """An expert's output times its weight, rounded to the wider of both dtypes; float32."""
    weighted_H = down_H.to(tl.float32) * weight.to(tl.float32)
    if weight.dtype == down_H.dtype:
        weighted_H = weighted_H.to(down_H.dtype).to(tl.float32)
    return weighted_H


@triton.jit
def added_to(
    out_H: tl.tensor,
    added_H: tl.tensor,
    residual_H: tl.tensor,
    inside_H: tl.tensor,
    ADDED: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> tl.tensor:
    """A token's sum, plus what added_H points to, plus that on what residual_H points to, rounded
    after each."""
    if ADDED:
        more_H = tl.load(added_H, mask=inside_H, other=0.0)
        out_H = (out_H.to(tl.float32) + more_H.to(tl.float32)).to(out_H.dtype)
    if RESIDUAL:
        base_H = tl.load(residual_H, mask=inside_H, other=0.0)
        out_H = (base_H.to(tl.float32) + out_H.to(tl.float32)).to(out_H.dtype)
    return out_H


@triton.jit(do_not_specialize=["first_slot"])
def combine_kernel(
    down_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    added_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    added_stride: tl.int64,
    residual_stride: tl.int64,
    first_slot: tl.int32,
    SLOTS: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    ADDED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """One token; down_ptr has rows of pairs. A weight is applied here, and not to what down_ptr
    holds, which so needs 16 bits where weights have 32."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    input_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_H = input_H < H
    sum_H = tl.zeros((BLOCK_H,), tl.float32)
    for place in tl.static_range(TOP_K):
        pair = row * TOP_K + place
        expert = tl.load(ids_ptr + pair)
        slot = expert - first_slot
        held = (expert >= 0) & (slot >= 0) & (slot < SLOTS)
        weight = tl.load(weights_ptr + pair, mask=held, other=0.0)
        down_H = tl.load(down_ptr + pair * H + input_H, mask=inside_H & held, other=0.0)
        sum_H += weighted(down_H, weight)
    out_H = added_to(
        sum_H.to(dtype),
        added_ptr + row * added_stride + input_H,
        residual_ptr + row * residual_stride + input_H,
        inside_H,
        ADDED,
        RESIDUAL,
    )
    tl.store(out_ptr + row * H + input_H, out_H, mask=inside_H)
