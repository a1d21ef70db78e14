"""Products of int8 of any number of rows, and the scaling of sums that others made.

O output features, I inputs, R rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scaled(
    sum_RO: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    row_R: tl.tensor,
    feature_O: tl.tensor,
    rows: tl.int32,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:
    """float32 [R, O], with the bias, in the order of the reference."""
    x_scale_R = tl.load(x_scale_ptr + row_R, mask=row_R < rows, other=0.0)
    scale_O = tl.load(scale_ptr + feature_O, mask=feature_O < OUT, other=0.0)
    out_RO = sum_RO.to(tl.float32) * x_scale_R[:, None] * scale_O[None, :]
    if BIAS:
        bias_O = tl.load(bias_ptr + feature_O, mask=feature_O < OUT, other=0.0)
        out_RO = out_RO + bias_O.to(tl.float32)[None, :]
    return out_RO


@triton.jit(do_not_specialize=["rows"])
def int8_gemm_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.int32,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Programs with the same features follow each other: the weight is read from memory once."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    sum_RO = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    x_row_R1 = x_ptr + row_R.to(tl.int64)[:, None] * IN
    weight_1O = weight_ptr + feature_O.to(tl.int64)[None, :] * IN
    for start in tl.range(0, IN, BLOCK_I, num_stages=STAGES):
        input_I = start + tl.arange(0, BLOCK_I)
        inside_RI = (row_R[:, None] < rows) & (input_I[None, :] < IN)
        x_RI = tl.load(x_row_R1 + input_I[None, :], mask=inside_RI, other=0)
        if OUT % BLOCK_O == 0 and IN % BLOCK_I == 0:
            weight_IO = tl.load(weight_1O + input_I[:, None])
        else:
            inside_IO = (feature_O[None, :] < OUT) & (input_I[:, None] < IN)
            weight_IO = tl.load(weight_1O + input_I[:, None], mask=inside_IO, other=0)
        sum_RO = tl.dot(x_RI, weight_IO, sum_RO, out_dtype=tl.int32)
    out_RO = _scaled(sum_RO, x_scale_ptr, scale_ptr, bias_ptr, row_R, feature_O, rows, OUT, BIAS)
    out_pointers_RO = out_ptr + row_R.to(tl.int64)[:, None] * OUT + feature_O[None, :]
    inside_RO = (row_R[:, None] < rows) & (feature_O[None, :] < OUT)
    tl.store(out_pointers_RO, out_RO.to(out_ptr.dtype.element_ty), mask=inside_RO)


@triton.jit(do_not_specialize=["rows"])
def int8_scale_kernel(
    sums_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.int32,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """int32 sums [R, O] -> the result in the output's dtype."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offset_RO = row_R.to(tl.int64)[:, None] * OUT + feature_O[None, :]
    inside_RO = (row_R[:, None] < rows) & (feature_O[None, :] < OUT)
    sum_RO = tl.load(sums_ptr + offset_RO, mask=inside_RO, other=0)
    out_RO = _scaled(sum_RO, x_scale_ptr, scale_ptr, bias_ptr, row_R, feature_O, rows, OUT, BIAS)
    tl.store(out_ptr + offset_RO, out_RO.to(out_ptr.dtype.element_ty), mask=inside_RO)
