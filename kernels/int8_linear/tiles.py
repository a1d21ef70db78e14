"""The product of 1 to 16 rows of int8: tiles of the weight times all rows at once.

Bound by the bandwidth of the weight, which is read once. Sums are integers, so that neither the
rows beside a row nor the order of the splits show in what it gets.

O output features of a tile, I inputs of a pass, R rows, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear.epilogue import gate, store, with_bias


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
    pointers_OI = weight_ptr + feature_O.to(tl.int64)[:, None] * IN + input_I[None, :]
    if OUT % BLOCK_O == 0 and IN % BLOCK_I == 0:
        return tl.load(pointers_OI, eviction_policy="evict_first")
    inside_OI = (feature_O[:, None] < OUT) & (input_I[None, :] < IN)
    return tl.load(pointers_OI, mask=inside_OI, other=0, eviction_policy="evict_first")


@triton.jit
def _sum_of_splits(
    sum_OR: tl.tensor,
    partial_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    feature_O1: tl.tensor,
    row_1R: tl.tensor,
    inside_OR: tl.tensor,
    rows: tl.int32,
    OUT: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Publish this split; returns (the sum of all, whether this was the last)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    pointers_OR = partial_ptr + row_1R * OUT + feature_O1
    step = rows.to(tl.int64) * OUT
    tl.store(pointers_OR + split * step, sum_OR, mask=inside_OR)
    # The barrier puts every thread's stores before the one thread's release.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
    is_last = arrived == SPLITS - 1
    if is_last:
        sum_OR = tl.zeros(sum_OR.shape, tl.int32)
        for other in tl.static_range(SPLITS):
            sum_OR += tl.load(
                pointers_OR + other * step, mask=inside_OR, other=0, cache_modifier=".cg"
            )
        tl.store(counters_ptr + tile, 0)
    return sum_OR, is_last


@triton.jit
def _scaled(
    sum_OR: tl.tensor,
    x_scale_1R: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    feature_O1: tl.tensor,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:
    """The sums of a tile in float32, with the bias."""
    scale_O1 = tl.load(scale_ptr + feature_O1, mask=feature_O1 < OUT, other=0.0)
    out_OR = sum_OR.to(tl.float32) * x_scale_1R * scale_O1
    if BIAS:
        out_OR = with_bias(out_OR, bias_ptr, feature_O1, OUT)
    return out_OR


@triton.jit(do_not_specialize=["rows"])
def int8_tiles_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    residual_stride: tl.int64,
    rows: tl.int32,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    """OUT: features of the result, half of those of a gated weight. partial_ptr: int32."""
    feature_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    SHARE: tl.constexpr = ((IN + BLOCK_I - 1) // BLOCK_I + SPLITS - 1) // SPLITS * BLOCK_I
    begin = tl.program_id(1) * SHARE
    up_ptr = weight_ptr + tl.cast(OUT, tl.int64) * IN
    row_R = tl.arange(0, BLOCK_R)
    sum_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.int32)
    up_sum_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.int32)
    for start in tl.range(begin, tl.minimum(begin + SHARE, IN), BLOCK_I, num_stages=STAGES):
        input_I = start + tl.arange(0, BLOCK_I)
        inside_IR = (input_I[:, None] < IN) & (row_R[None, :] < rows)
        x_pointers_IR = x_ptr + row_R.to(tl.int64)[None, :] * IN + input_I[:, None]
        x_IR = tl.load(x_pointers_IR, mask=inside_IR, other=0)
        weight_OI = _weights(weight_ptr, feature_O, input_I, OUT, IN, BLOCK_O, BLOCK_I)
        sum_OR = tl.dot(weight_OI, x_IR, sum_OR, out_dtype=tl.int32)
        if GATED:
            up_OI = _weights(up_ptr, feature_O, input_I, OUT, IN, BLOCK_O, BLOCK_I)
            up_sum_OR = tl.dot(up_OI, x_IR, up_sum_OR, out_dtype=tl.int32)
    feature_O1 = feature_O[:, None]
    row_1R = row_R.to(tl.int64)[None, :]
    inside_OR = (feature_O1 < OUT) & (row_1R < rows)
    is_last = True
    if SPLITS > 1:
        sum_OR, is_last = _sum_of_splits(
            sum_OR, partial_ptr, counters_ptr, feature_O1, row_1R, inside_OR, rows, OUT, SPLITS
        )
    if is_last:
        x_scale_1R = tl.load(x_scale_ptr + row_1R, mask=row_1R < rows, other=0.0)
        out_OR = _scaled(sum_OR, x_scale_1R, scale_ptr, bias_ptr, feature_O1, OUT, BIAS)
        if GATED:
            up_OR = _scaled(
                up_sum_OR, x_scale_1R, scale_ptr + OUT, bias_ptr + OUT, feature_O1, OUT, BIAS
            )
            out_OR = gate(out_OR, up_OR, out_ptr.dtype.element_ty)
        store(
            out_OR,
            out_ptr,
            residual_ptr,
            residual_stride,
            feature_O1,
            row_1R,
            inside_OR,
            OUT,
            RESIDUAL,
        )
