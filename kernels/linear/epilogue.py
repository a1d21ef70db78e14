"""What happens to the sums of a product before they are stored; shared by both kernels.

O output features of a tile, R rows; the one-row kernel has R = 1 in its tensors' last place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def with_bias(
    sum_OR: tl.tensor, bias_ptr: tl.tensor, feature_O1: tl.tensor, OUT: tl.constexpr
) -> tl.tensor:
    """The sums plus the bias of their features, still float32."""
    bias_O1 = tl.load(bias_ptr + feature_O1, mask=feature_O1 < OUT, other=0.0)
    return sum_OR + bias_O1.to(tl.float32)


@triton.jit
def gate(gate_OR: tl.tensor, up_OR: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """silu(gate) * up, rounded to DTYPE where the separate kernels round; float32."""
    gate_OR = gate_OR.to(DTYPE).to(tl.float32)
    up_OR = up_OR.to(DTYPE).to(tl.float32)
    silu_OR = (gate_OR / (1.0 + tl.exp(-gate_OR))).to(DTYPE).to(tl.float32)
    return silu_OR * up_OR


@triton.jit
def store(
    sum_OR: tl.tensor,
    out_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    residual_stride: tl.int64,
    feature_O1: tl.tensor,
    row_1R: tl.tensor,
    inside_OR: tl.tensor,
    OUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    """Round, add the residual if there is one, and write."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if RESIDUAL:
        residual_ptr += row_1R * residual_stride + feature_O1
        residual_OR = tl.load(residual_ptr, mask=inside_OR, other=0.0).to(tl.float32)
        sum_OR = residual_OR + sum_OR.to(dtype).to(tl.float32)
    tl.store(out_ptr + row_1R * OUT + feature_O1, sum_OR.to(dtype), mask=inside_OR)
