"""silu(gate) * up against its formula, and Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import silu_mul
from kernels.testing import assert_close, poisoned_allocations, triton_device

SHAPES = [(1, 2), (7, 126), (3, 5, 200), (2, 3072), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula_in_float64(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3
    before = x.clone()
    gate, up = x.double().chunk(2, dim=-1)
    want = (gate / (1 + (-gate).exp()) * up).float()
    assert_close("silu_mul", silu_mul(x, backend="torch"), want, torch.float32)
    assert torch.equal(x, before)


def test_reference_rounds_silu_before_the_product() -> None:
    x = (torch.randn(9, 126) * 3).bfloat16()
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(silu_mul(x, backend="torch"), torch.nn.functional.silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(triton_device(), dtype)
    with poisoned_allocations():
        got = silu_mul(x, backend="triton")
    assert_close("silu_mul", got, silu_mul(x, backend="torch"), dtype)
