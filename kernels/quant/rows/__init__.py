"""Rows of floats as int8 and one float32 scale each: weights by output channel, inputs by token.

The scale of a row is its largest magnitude over 127, and 1 for a row of zeros; an element is
x / scale, rounded to the nearest integer, ties to even. Every step is a correctly rounded float32
operation, so that the bits are the same on every device. Symmetric quantisation by row is what
LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) calls vector-wise.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.quant.rows import reference


def quantize_rows(
    x: torch.Tensor,
    *,
    backend: KernelBackend,
    norm_weight_I: torch.Tensor | None = None,
    eps: float = 0.0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., I] -> (int8 [..., I], scales float32 [...]), both contiguous.

    x: any float dtype, first rounded to float32 where it is wider. A row with NaN or inf has that
    for its scale. norm_weight_I, eps: x is RMS-normalised with them first, and rounded to its
    dtype where `rms_norm` rounds.
    out: memory for the two, contiguous, which is returned.
    What a row gets depends on nothing else. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.quantize_rows(x, norm_weight_I, eps, out)
    if backend == "triton":
        from kernels.quant.rows import triton

        return triton.quantize_rows(x, norm_weight_I, eps, out)
    raise unknown_backend(backend)
