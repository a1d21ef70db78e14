"""Root-mean-square layer norm (Zhang and Sennrich, 2019), plain and with a residual add."""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.norm import reference
from kernels.weighting import Weighting

__all__ = ["Weighting", "add_rms_norm", "rms_norm"]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    weighting: Weighting = "rounded",
    backend: KernelBackend,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    x: [..., D], float32, bfloat16 or float16; weight: [D], the same dtype. The result has
    the shape and dtype of x. Normalised in float32; `weighting` says where that is rounded.
    Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.rms_norm(x, weight, eps, weighting)
    if backend == "triton":
        from kernels.norm import triton

        return triton.rms_norm(x, weight, eps, weighting)
    raise unknown_backend(backend)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    weighting: Weighting = "rounded",
    backend: KernelBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual, then `rms_norm`: returns (normed, x + residual).

    x and residual: [..., D] of one dtype; the sum is rounded to that dtype before it is
    normalised. Neither argument is changed. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.add_rms_norm(x, residual, weight, eps, weighting)
    if backend == "triton":
        from kernels.norm import triton

        return triton.add_rms_norm(x, residual, weight, eps, weighting)
    raise unknown_backend(backend)
