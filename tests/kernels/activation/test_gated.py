"""Gated activations against their formulas, and Triton against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.activation import gelu_tanh_mul, silu_mul
from kernels.testing import assert_close, poisoned_allocations, triton_device

SHAPES = [(1, 2), (7, 126), (3, 5, 200), (2, 3072), (0, 8)]
KERNELS = [silu_mul, gelu_tanh_mul]
Kernel = Callable[..., torch.Tensor]


def formula(kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
    if kernel is silu_mul:
        return x / (1 + (-x).exp())
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + inner.tanh())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula_in_float64(shape: tuple[int, ...], kernel: Kernel) -> None:
    x = torch.randn(shape) * 3
    before = x.clone()
    gate, up = x.double().chunk(2, dim=-1)
    want = (formula(kernel, gate) * up).float()
    assert_close(kernel.__name__, kernel(x, backend="torch"), want, torch.float32)
    assert torch.equal(x, before)


def test_reference_rounds_the_activation_before_the_product() -> None:
    x = (torch.randn(9, 126) * 3).bfloat16()
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(silu_mul(x, backend="torch"), torch.nn.functional.silu(gate) * up)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    assert torch.equal(gelu_tanh_mul(x, backend="torch"), gelu * up)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_matches_reference(
    shape: tuple[int, ...], kernel: Kernel, dtype: torch.dtype
) -> None:
    x = (torch.randn(shape) * 3).to(triton_device(), dtype)
    with poisoned_allocations():
        got = kernel(x, backend="triton")
    assert_close(kernel.__name__, got, kernel(x, backend="torch"), dtype)
