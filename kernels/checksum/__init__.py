"""A position-sensitive 64-bit sum over the bits of a tensor.

The bits of element i, read as a signed integer x_i and shifted to be non-zero, are weighted
by an odd multiplier m(i) and summed modulo 2^64. Exact integer arithmetic: the value is the
same on every device and in every order. m is SplitMix64 (Steele, Lea and Flood 2014) of
i + 1, so that moved, swapped and changed elements all show.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.checksum import reference


def checksum_into(
    total: torch.Tensor,
    tensor: torch.Tensor,
    *,
    backend: KernelBackend,
    peak: torch.Tensor | None = None,
    start: int = 0,
) -> None:
    """Add the checksum of `tensor` to `total`, in place, without waiting for the device.

    total: int64 [1] on the tensor's device. tensor: any dtype of 1, 2, 4 or 8 bytes (one-byte
    elements are read unsigned) and any shape, read in row-major order.
    peak: int64 [1] on that device; raised, on the same pass, to the largest element's bits
    without their sign. Of IEEE floats these order as magnitudes do, with inf and then NaN last.
    start: place of the first element in a longer tensor, whose checksum is the sum of its parts'.
    Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        reference.checksum_into(total, tensor, peak, start)
    elif backend == "triton":
        from kernels.checksum import triton

        triton.checksum_into(total, tensor, peak, start)
    else:
        raise unknown_backend(backend)
