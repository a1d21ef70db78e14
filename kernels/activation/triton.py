"""Gated activations on GPU. I: intermediate width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gated_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.int64,
    width: tl.int32,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offset_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_I = offset_I < width
    gate_ptr = gate_up_ptr + row * row_stride
    gate_I = tl.load(gate_ptr + offset_I, mask=inside_I, other=0.0)
    up_I = tl.load(gate_ptr + width + offset_I, mask=inside_I, other=0.0).to(tl.float32)
    wide_I = gate_I.to(tl.float32)
    if GELU:
        # 0.5 * (1 + tanh(z)) is the logistic function of 2 z.
        inner_I = 1.5957691216057308 * (wide_I + 0.044715 * wide_I * wide_I * wide_I)
        active_I = wide_I / (1.0 + tl.exp(-inner_I))
    else:
        active_I = wide_I / (1.0 + tl.exp(-wide_I))
    active_I = active_I.to(gate_I.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + offset_I, (active_I * up_I).to(gate_I.dtype), mask=inside_I)


def silu_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """See `kernels.activation.silu_mul`."""
    return _gated(gate_up_T2I, gelu=False)


def gelu_tanh_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """See `kernels.activation.gelu_tanh_mul`."""
    return _gated(gate_up_T2I, gelu=True)


def _gated(gate_up_T2I: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    *leading, double = gate_up_T2I.shape
    rows_T2I = gate_up_T2I.reshape(-1, double)
    if rows_T2I.stride(1) != 1:
        rows_T2I = rows_T2I.contiguous()
    width = double // 2
    out_TI = gate_up_T2I.new_empty(*leading, width)
    if out_TI.numel():
        block = min(triton.next_power_of_2(width), 1024)
        grid = (rows_T2I.shape[0], triton.cdiv(width, block))
        stride = rows_T2I.stride(0)
        _gated_mul_kernel[grid](rows_T2I, out_TI, stride, width, GELU=gelu, BLOCK=block)
    return out_TI
