"""RMSNorm on GPU: one program a row. D: width, BLOCK: D padded to a power of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.weighting import Weighting


@triton.jit
def norm_row(
    x_D: tl.tensor,
    weight_ptr: tl.tensor,
    offset_D: tl.tensor,
    inside_D: tl.tensor,
    eps: tl.float32,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    OFFSET: tl.constexpr,
) -> tl.tensor:
    """The normalised row, in the dtype of x. WIDE: weighted before it is rounded. OFFSET: by one
    more than the weight."""
    wide_D = x_D.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide_D * wide_D, axis=0) / D + eps)
    normed_D = wide_D * scale
    if not WIDE:
        normed_D = normed_D.to(x_D.dtype).to(tl.float32)
    weight_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    if OFFSET:
        weight_D = 1.0 + weight_D
    return (normed_D * weight_D).to(x_D.dtype)


def row_block(width: int) -> tuple[int, int]:
    """(numbers, warps) of the program that normalises a row; the order of its sum follows them."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    x_stride: tl.int64,
    x_inner_stride: tl.int64,
    residual_stride: tl.int64,
    residual_inner_stride: tl.int64,
    eps: tl.float32,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // INNER, row % INNER
    x_row_ptr = x_ptr + outer * x_stride + inner * x_inner_stride
    offset_D = tl.arange(0, BLOCK)
    inside_D = offset_D < D
    x_D = tl.load(x_row_ptr + offset_D, mask=inside_D, other=0.0)
    if ADD:
        residual_row_ptr = residual_ptr + outer * residual_stride + inner * residual_inner_stride
        residual_D = tl.load(residual_row_ptr + offset_D, mask=inside_D, other=0.0)
        x_D = (x_D.to(tl.float32) + residual_D.to(tl.float32)).to(x_D.dtype)
        tl.store(total_ptr + row * D + offset_D, x_D, mask=inside_D)
    normed_D = norm_row(x_D, weight_ptr, offset_D, inside_D, eps, D, WIDE, OFFSET)
    tl.store(out_ptr + row * D + offset_D, normed_D, mask=inside_D)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weighting: Weighting = "rounded",
) -> torch.Tensor:
    """See `kernels.norm.rms_norm`."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, rows, weight, out, out, eps, weighting, add=False)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weighting: Weighting = "rounded",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    rows, residual_rows = _rows(x), _rows(residual)
    _launch(rows, residual_rows, weight, out, total, eps, weighting, add=True)
    return out, total


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[outer, inner, D] without a copy where three dimensions reach, as for the heads of a
    slice of fused QKV."""
    rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _launch(
    rows: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    weighting: Weighting,
    *,
    add: bool,
) -> None:
    outer, inner, width = rows.shape
    if outer * inner == 0:
        return
    block, warps = row_block(width)
    _rms_norm_kernel[(outer * inner,)](
        rows,
        residual,
        weight,
        out,
        total,
        *rows.stride()[:2],
        *residual.stride()[:2],
        eps,
        D=width,
        BLOCK=block,
        INNER=inner,
        ADD=add,
        WIDE=weighting != "rounded",
        OFFSET=weighting == "offset",
        num_warps=warps,
    )
