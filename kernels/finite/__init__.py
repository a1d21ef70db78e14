"""Whether tensors hold finite numbers only: their largest magnitude, where NaN counts as one.

One number a tensor answers both questions of whoever takes weights in: is there NaN or inf, and
would a value overflow in a narrower dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.finite import reference


def peaks(tensors: Sequence[torch.Tensor], *, backend: KernelBackend) -> list[torch.Tensor]:
    """max |x| of each tensor, a scalar of its dtype and device, NaN where any element is NaN.

    tensors: floating point, any shape; those of a call share their dtype and device. An empty
    tensor has the peak 0. One-byte floats are widened, so their peaks are float32. Nothing waits
    for the device. backend: "torch" and "triton" both run torch's kernels, which read each
    tensor once and take many small ones in a launch. Raises ValueError on an unknown backend.
    """
    if backend not in ("torch", "triton"):
        raise unknown_backend(backend)
    return reference.peaks(tensors)
