"""Gated activations of a feed-forward block (SwiGLU and GEGLU; Shazeer, 2020)."""

from __future__ import annotations

import torch

from kernels.activation import reference
from kernels.backend import KernelBackend, unknown_backend


def silu_mul(gate_up_T2I: torch.Tensor, *, backend: KernelBackend) -> torch.Tensor:
    """`silu(gate) * up` of the two halves of the last dimension; gate is the first.

    gate_up_T2I: [..., 2 * I], float32, bfloat16 or float16; returns [..., I] in that dtype.
    silu is computed in float32 and rounded to the dtype before the product.
    Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.silu_mul(gate_up_T2I)
    if backend == "triton":
        from kernels.activation import triton

        return triton.silu_mul(gate_up_T2I)
    raise unknown_backend(backend)


def gelu_tanh_mul(gate_up_T2I: torch.Tensor, *, backend: KernelBackend) -> torch.Tensor:
    """`gelu(gate) * up`, gelu by its tanh approximation; otherwise as `silu_mul`."""
    if backend == "torch":
        return reference.gelu_tanh_mul(gate_up_T2I)
    if backend == "triton":
        from kernels.activation import triton

        return triton.gelu_tanh_mul(gate_up_T2I)
    raise unknown_backend(backend)
