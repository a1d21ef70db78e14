"""The product of one row: every program takes a few output features over all inputs.

Bound by the bandwidth of the weight, which is read once in 16-byte pieces with all loads of a
pass in flight. O output features of a program, I inputs of a pass.
"""

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
    return weight_OI.to(tl.float32)


@triton.jit
def gemv_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.float32,
    OUT: tl.constexpr,
    IN: tl.constexpr,
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
    scale = 1.0
    if NORM:
        scale = _inverse_rms(x_ptr, eps, IN, BLOCK_I)
    sum_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    up_sum_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    CHUNK: tl.constexpr = BLOCK_I * UNROLL
    for start in tl.range(0, IN, CHUNK, num_stages=STAGES):
        for piece in tl.static_range(UNROLL):
            offset_1I = start + piece * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
            x_1I = _input(x_ptr, norm_ptr, scale, offset_1I, IN, NORM)
            sum_OI += x_1I * _weights(weight_ptr, feature_O, offset_1I, OUT, IN, BLOCK_O, CHUNK)
            if GATED:
                up_OI = _weights(up_ptr, feature_O, offset_1I, OUT, IN, BLOCK_O, CHUNK)
                up_sum_OI += x_1I * up_OI
    feature_O1 = feature_O[:, None]
    sum_O1 = tl.sum(sum_OI, axis=1)[:, None]
    if BIAS:
        sum_O1 = with_bias(sum_O1, bias_ptr, feature_O1, OUT)
    if GATED:
        up_sum_O1 = tl.sum(up_sum_OI, axis=1)[:, None]
        if BIAS:
            up_sum_O1 = with_bias(up_sum_O1, bias_ptr + OUT, feature_O1, OUT)
        sum_O1 = gate(sum_O1, up_sum_O1, out_ptr.dtype.element_ty)
    row_11 = tl.zeros((1, 1), tl.int64)
    inside_O1 = feature_O1 < OUT
    store(sum_O1, out_ptr, residual_ptr, 0, feature_O1, row_11, inside_O1, OUT, RESIDUAL)
