"""The product of one row, or of a few: every program takes a few output features over all inputs.

Bound by the bandwidth of the weight, which is read once in 16-byte pieces with all loads of a
turn in flight. Each row has its sums in registers, in the order that one row alone has them: what
a row gets does not depend on the rows beside it, to the bit.

O output features of a program, I inputs of a pass.
"""

# Tuples grow in loops that the compiler unrolls.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear.epilogue import gate, store, with_bias


@triton.jit
def _inverse_rms(
    x_ptr: tl.tensor, eps: tl.float32, IN: tl.constexpr, BLOCK_I: tl.constexpr
) -> tl.tensor:
    square_1I = tl.zeros((1, BLOCK_I), tl.float32)
    for start in tl.static_range(0, IN, BLOCK_I):
        offset_1I = start + tl.arange(0, BLOCK_I)[None, :]
        x_1I = tl.load(x_ptr + offset_1I, mask=offset_1I < IN, other=0.0).to(tl.float32)
        square_1I += x_1I * x_1I
    return 1.0 / tl.sqrt(tl.sum(square_1I) / IN + eps)


@triton.jit
def _input(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    scale: tl.tensor,
    offset_1I: tl.tensor,
    IN: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    x_1I = tl.load(x_ptr + offset_1I, mask=offset_1I < IN, other=0.0)
    wide_1I = x_1I.to(tl.float32)
    if NORM:
        norm_1I = tl.load(norm_ptr + offset_1I, mask=offset_1I < IN, other=0.0).to(tl.float32)
        wide_1I = (wide_1I * scale).to(x_1I.dtype).to(tl.float32) * norm_1I
        wide_1I = wide_1I.to(x_1I.dtype).to(tl.float32)
    return wide_1I


@triton.jit
def _weights(
    weight_ptr: tl.tensor,
    feature_O: tl.tensor,
    offset_1I: tl.tensor,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    pointers_OI = weight_ptr + feature_O.to(tl.int64)[:, None] * IN + offset_1I
    if OUT % BLOCK_O == 0 and IN % CHUNK == 0:
        weight_OI = tl.load(pointers_OI, eviction_policy="evict_first")
    else:
        inside_OI = (feature_O[:, None] < OUT) & (offset_1I < IN)
        weight_OI = tl.load(pointers_OI, mask=inside_OI, other=0.0, eviction_policy="evict_first")
    return weight_OI


@triton.jit
def _scale(
    x_ptr: tl.tensor,
    eps: tl.float32,
    IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    scale = 1.0
    if NORM:
        scale = _inverse_rms(x_ptr, eps, IN, BLOCK_I)
    return scale


@triton.jit
def norm_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.int64,
    eps: tl.float32,
    IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """The norm of `gemv_kernel` alone, a row a program: for rows too many to have it in every
    program of the product."""
    row = tl.program_id(0).to(tl.int64)
    scale = _inverse_rms(x_ptr + row * x_stride, eps, IN, BLOCK_I)
    for start in tl.static_range(0, IN, BLOCK_I):
        offset_1I = start + tl.arange(0, BLOCK_I)[None, :]
        x_1I = _input(x_ptr + row * x_stride, norm_ptr, scale, offset_1I, IN, True)
        out_1I = out_ptr + row * IN + offset_1I
        tl.store(out_1I, x_1I.to(out_ptr.dtype.element_ty), mask=offset_1I < IN)


@triton.jit
def _add_products(
    sums: tl.tuple,
    up_sums: tl.tuple,
    weights: tl.tuple,
    ups: tl.tuple,
    scales: tl.tuple,
    x_ptr: tl.tensor,
    x_stride: tl.int64,
    norm_ptr: tl.tensor,
    start: tl.int32,
    IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """The sums of all rows after the passes of one turn, in order."""
    added, up_added = (), ()
    for row in tl.static_range(ROWS):
        sum_OI, up_sum_OI = sums[row], up_sums[row]
        for piece in tl.static_range(UNROLL):
            offset_1I = start + piece * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
            x_1I = _input(x_ptr + row * x_stride, norm_ptr, scales[row], offset_1I, IN, NORM)
            sum_OI += x_1I * weights[piece].to(tl.float32)
            if GATED:
                up_sum_OI += x_1I * ups[piece].to(tl.float32)
        added += (sum_OI,)
        up_added += (up_sum_OI,)
    return added, up_added


@triton.jit
def gemv_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    eps: tl.float32,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    """OUT: features of the result, half of those of a gated weight."""
    feature_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    up_ptr = weight_ptr + tl.cast(OUT, tl.int64) * IN
    scales, sums, up_sums = (), (), ()
    for row in tl.static_range(ROWS):
        scales += (_scale(x_ptr + row * x_stride, eps, IN, BLOCK_I, NORM),)
        sums += (tl.zeros((BLOCK_O, BLOCK_I), tl.float32),)
        up_sums += (tl.zeros((BLOCK_O, BLOCK_I), tl.float32),)
    CHUNK: tl.constexpr = BLOCK_I * UNROLL
    for start in tl.range(0, IN, CHUNK, num_stages=STAGES):
        weights, ups = (), ()
        for piece in tl.static_range(UNROLL):
            offset_1I = start + piece * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
            weights += (_weights(weight_ptr, feature_O, offset_1I, OUT, IN, BLOCK_O, CHUNK),)
            if GATED:
                ups += (_weights(up_ptr, feature_O, offset_1I, OUT, IN, BLOCK_O, CHUNK),)
        sums, up_sums = _add_products(
            sums,
            up_sums,
            weights,
            ups,
            scales,
            x_ptr,
            x_stride,
            norm_ptr,
            start,
            IN,
            BLOCK_I,
            ROWS,
            UNROLL,
            NORM,
            GATED,
        )
    feature_O1 = feature_O[:, None]
    inside_O1 = feature_O1 < OUT
    for row in tl.static_range(ROWS):
        sum_O1 = tl.sum(sums[row], axis=1)[:, None]
        if BIAS:
            sum_O1 = with_bias(sum_O1, bias_ptr, feature_O1, OUT)
        if GATED:
            up_sum_O1 = tl.sum(up_sums[row], axis=1)[:, None]
            if BIAS:
                up_sum_O1 = with_bias(up_sum_O1, bias_ptr + OUT, feature_O1, OUT)
            sum_O1 = gate(sum_O1, up_sum_O1, out_ptr.dtype.element_ty)
        row_11 = tl.full((1, 1), row, tl.int64)
        store(
            sum_O1,
            out_ptr,
            residual_ptr,
            residual_stride,
            feature_O1,
            row_11,
            inside_O1,
            OUT,
            RESIDUAL,
        )
