"""Rows as int8 on GPU: a program a row, which is read once and kept in registers.

I elements of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.quant.rows import reference

_MOST = 1 << 16
"""Elements of the longest row that a program keeps."""


@triton.jit
def _normed(
    x_I: tl.tensor, norm_I: tl.tensor, eps: tl.float32, IN: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """The row as `rms_norm` rounds it, widened again."""
    inverse = 1.0 / tl.sqrt(tl.sum(x_I * x_I) / IN + eps)
    x_I = (x_I * inverse).to(DTYPE).to(tl.float32) * norm_I
    return x_I.to(DTYPE).to(tl.float32)


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    quantized_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.int64,
    eps: tl.float32,
    IN: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offset_I = tl.arange(0, BLOCK)
    inside_I = offset_I < IN
    x_I = tl.load(x_ptr + row * x_stride + offset_I, mask=inside_I, other=0.0).to(tl.float32)
    if NORM:
        norm_I = tl.load(norm_ptr + offset_I, mask=inside_I, other=0.0).to(tl.float32)
        x_I = _normed(x_I, norm_I, eps, IN, x_ptr.dtype.element_ty)
    # Magnitudes as integers of the same order, in which NaN is above inf.
    bits_I = x_I.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(bits_I, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(peak, 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    ratio_I = tl.div_rn(x_I, tl.zeros_like(x_I) + scale)
    ratio_I = tl.where(ratio_I == ratio_I, ratio_I, 0.0)
    ratio_I = tl.minimum(tl.maximum(ratio_I, -127.0), 127.0)
    # What is added leaves no bit behind the point, and rounds to even.
    rounded_I = (ratio_I + 12582912.0) - 12582912.0
    tl.store(quantized_ptr + row * IN + offset_I, rounded_I.to(tl.int8), mask=inside_I)
    tl.store(scale_ptr + row, scale)


def quantize_rows(
    x: torch.Tensor,
    norm_weight_I: torch.Tensor | None,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.quant.rows.quantize_rows`."""
    ins = x.shape[-1]
    if ins > _MOST or ins == 0:
        return reference.quantize_rows(x, norm_weight_I, eps, out)
    if x.dtype == torch.float64:
        x = x.float()
    x_RI = x.reshape(-1, ins)
    if x_RI.stride(1) != 1:
        x_RI = x_RI.contiguous()
    quantized, scale = out or (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )
    assert quantized.is_contiguous() and scale.is_contiguous()
    if not len(x_RI):
        return quantized, scale
    block = triton.next_power_of_2(ins)
    # A trainer's tensors may lie on another GPU than the one that kernels are launched on.
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _quantize_kernel[(len(x_RI),)](
            x_RI,
            x_RI if norm_weight_I is None else norm_weight_I,
            quantized,
            scale,
            x_RI.stride(0),
            eps,
            IN=ins,
            BLOCK=block,
            NORM=norm_weight_I is not None,
            num_warps=min(max(block // 1024, 1), 16),
            enable_fp_fusion=False,
        )
    return quantized, scale
