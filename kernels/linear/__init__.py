"""Matrix products of few rows with what surrounds them in a decoder layer, in one kernel.

Shapes: R rows, I input features, O output features; A = O / 2 with `gated`.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.linear import reference
from kernels.linear.fusion import Options

__all__ = ["Options", "fused_linear", "new_counters"]

MAX_TILES = 1024
"""Entries of the buffer that `new_counters` makes."""


def new_counters(device: torch.device) -> torch.Tensor:
    """Zeroed int32 state for `fused_linear`, which leaves it zeroed.

    Calls that may run at the same time need one each.
    """
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def fused_linear(
    x_RI: torch.Tensor,
    weight_OI: torch.Tensor,
    options: Options | None = None,
    *,
    backend: KernelBackend,
) -> torch.Tensor:
    """`norm(x) @ weight.T + bias`, then gated or added to a residual; see `Options`.

    x_RI: float32, bfloat16 or float16, last dimension contiguous; weight_OI: contiguous, of one
    dtype with x. Products are summed in float32 and rounded once, after the bias; the norm before
    and the gate or sum after round where `rms_norm`, `silu_mul` and a torch addition do.
    Returns [R, O] or, gated, [R, A], contiguous, in the dtype of x.
    The sums of a row run in an order that depends on the shape of the weight and on whether R is
    1 or 2, 3 to 16, or more, within the first two not on R; where I is no multiple of 8, 2 rows are
    multiplied as 3 are. Raises ValueError on an unknown
    backend.
    """
    options = options or Options()
    if backend == "torch":
        return reference.fused_linear(x_RI, weight_OI, options)
    if backend == "triton":
        from kernels.linear import triton

        return triton.fused_linear(x_RI, weight_OI, options)
    raise unknown_backend(backend)
