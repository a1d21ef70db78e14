"""Products of rows of floats with an int8 weight, both quantised by row, and what surrounds them.

Shapes: R rows, I input features, O output features; A = O / 2 with `gated`.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.int8_linear import reference
from kernels.linear.fusion import Options

__all__ = ["int8_linear"]


def int8_linear(
    x_RI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    options: Options | None = None,
    *,
    backend: KernelBackend,
) -> torch.Tensor:
    """`x @ (weight * scale).T + bias` with x as int8, then gated or added to a residual.

    x_RI: float32, bfloat16 or float16, last dim contiguous; `quantize_rows` makes it int8 and a
    scale a row, after the norm if there is one. weight_OI: int8, contiguous; scale_O: float32.
    Products of integers are summed exactly, times x's scale, times the weight's, plus the bias,
    each rounded to float32; the result is rounded to x's dtype once, and then as in
    `kernels.linear.fused_linear`. So without a norm and without `gated` the bits are those of the
    reference, and with any options a row's are the same however many rows there are.
    Returns [R, O] or, gated, [R, A], contiguous, in the dtype of x. I is at most 2^31 / 127^2.
    Raises ValueError on an unknown backend.
    """
    options = options or Options()
    if backend == "torch":
        return reference.int8_linear(x_RI, weight_OI, scale_O, options)
    if backend == "triton":
        from kernels.int8_linear import triton

        return triton.int8_linear(x_RI, weight_OI, scale_O, options)
    raise unknown_backend(backend)
