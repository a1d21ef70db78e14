"""The sum of a token's experts, weighed, in the order of their ids; then what else is added.

H hidden width of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
        weighted_H = down_H.to(tl.float32) * weight.to(tl.float32)
        if weights_ptr.dtype.element_ty == dtype:
            weighted_H = weighted_H.to(dtype).to(tl.float32)
        sum_H += weighted_H
    out_H = sum_H.to(dtype)
    if ADDED:
        added_H = tl.load(added_ptr + row * added_stride + input_H, mask=inside_H, other=0.0)
        out_H = (out_H.to(tl.float32) + added_H.to(tl.float32)).to(dtype)
    if RESIDUAL:
        residual_ptr += row * residual_stride
        residual_H = tl.load(residual_ptr + input_H, mask=inside_H, other=0.0)
        out_H = (residual_H.to(tl.float32) + out_H.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row * H + input_H, out_H, mask=inside_H)
