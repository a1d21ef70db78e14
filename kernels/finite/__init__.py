"""Whether tensors hold finite numbers only: their largest magnitude, where NaN counts as one.

One number a tensor answers both questions of whoever takes weights in: is there NaN or inf, and
would a value overflow in a narrower dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.finite import reference


def peaks(tensors: Sequence[torch.Tensor], *, backend: KernelBackend) -> torch.Tensor:
    """max |x| of each of n tensors, [n] of their dtype and device, NaN where any element is NaN.

    tensors: at least one, floating point, any shape; those of a call share their dtype and
    device. An empty tensor has the peak 0. One-byte floats are widened, so their peaks are
    float32. Each tensor is read once; nothing waits for the device. backend: "triton" takes all
    tensors in one launch. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.peaks(tensors)
    if backend == "triton":
        from kernels.finite import triton

        return triton.peaks(tensors)
    raise unknown_backend(backend)
