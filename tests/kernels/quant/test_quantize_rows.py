"""Rows as int8: the arithmetic against float64 and integers, and on a GPU against itself."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from kernels.quant.rows import quantize_rows
from kernels.testing import poisoned_allocations, triton_device

SHAPES = [(1, 1), (3, 63), (16, 100), (5, 4097), (2, 3, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_integers_are_those_of_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = drawn(shape).to(dtype)
    quantized, scale = quantize_rows(x, backend="torch")
    assert quantized.dtype == torch.int8 and quantized.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
    wide = x.float().double()
    # One float32 rounding of an exact quotient, which float64 holds closely enough to tell.
    assert torch.equal(scale, (wide.abs().amax(-1) / 127).float())
    exact = wide / scale.double()[..., None]
    assert ((quantized.double() - exact).abs() <= 0.5 + 1e-5).all()
    assert quantized.abs().amax(-1).eq(127).all()


def test_ties_go_to_even_and_the_largest_is_127() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]])
    quantized, scale = quantize_rows(x, backend="torch")
    assert scale.tolist() == [1.0]
    assert quantized.tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


def test_rounding_is_of_the_rounded_quotient() -> None:
    """465 over 127 is no float32: quotients are taken by the scale that is stored."""
    x = torch.tensor([[465.0, 100.0, -7.0]])
    quantized, scale = quantize_rows(x, backend="torch")
    stored = Fraction(scale.item())
    want = [round(Fraction(value) / stored) for value in x[0].tolist()]
    assert quantized[0].tolist() == want


def test_rows_of_zeros_have_scale_one() -> None:
    x = torch.tensor([[0.0, -0.0], [0.0, 2.0]])
    quantized, scale = quantize_rows(x, backend="torch")
    assert scale[0] == 1.0 and quantized[0].tolist() == [0, 0]
    assert quantized[1].tolist() == [0, 127]


def test_what_is_not_finite_shows_in_the_scale_of_its_row_alone() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, float("-inf")], [1.0, 2.0]])
    quantized, scale = quantize_rows(x, backend="torch")
    assert scale[0].isnan() and scale[1:3].isinf().all() and scale[3].isfinite()
    assert quantized[3].tolist() == [64, 127]


def test_no_rows_and_no_columns() -> None:
    assert quantize_rows(torch.empty(0, 5), backend="torch")[1].shape == (0,)
    quantized, scale = quantize_rows(torch.empty(2, 0), backend="torch")
    assert quantized.shape == (2, 0) and scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_memory_can_be_given(backend: str) -> None:
    device = "cpu" if backend == "torch" else triton_device()
    x = drawn((5, 63)).to(device)
    out = torch.full((5, 63), 99, dtype=torch.int8, device=device), x.new_full((5,), 9.0)
    found = quantize_rows(x, backend=backend, out=out)  # type: ignore[arg-type]
    want = quantize_rows(x.cpu(), backend="torch")
    assert all(a is b for a, b in zip(found, out, strict=True))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="cublas"):
        quantize_rows(torch.zeros(1, 1), backend="cublas")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (2, 8192), (1, 14336)])
def test_a_gpu_has_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = drawn(shape, seed=1).to(dtype)
    if len(shape) == 2 and shape[0] > 2:
        x[0] = 0
        x[1, 0] = float("nan")
        x[2, 0] = float("-inf")
    device = triton_device()
    with poisoned_allocations():
        got = quantize_rows(x.to(device), backend="triton")
    want = quantize_rows(x, backend="torch")
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu().view(torch.int32), want[1].view(torch.int32)) or (
        got[1].cpu().nan_to_num(-1.0).equal(want[1].nan_to_num(-1.0))
    )


@pytest.mark.gpu
def test_tiny_numbers_are_not_flushed() -> None:
    x = torch.tensor([[1e-40, 3e-41], [1e-44, -1e-45], [1e-38, 2e-39]])
    got = quantize_rows(x.to(triton_device()), backend="triton")
    want = quantize_rows(x, backend="torch")
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 64), (16, 100), (3, 4096)])
def test_a_norm_before_is_that_of_the_norm_kernel(shape: tuple[int, int]) -> None:
    from kernels.norm import rms_norm

    device = triton_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight = drawn(shape, 2).to(device, dtype), drawn(shape[1:], 3).to(device, dtype)
    got = quantize_rows(x, backend="triton", norm_weight_I=weight, eps=1e-6)
    normed = rms_norm(x, weight, 1e-6, backend="triton")
    want = quantize_rows(normed, backend="triton")
    torch.testing.assert_close(got[1], want[1], rtol=1e-2, atol=0)
    assert (got[0].int() - want[0].int()).abs().max() <= 1
