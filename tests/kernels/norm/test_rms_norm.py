"""RMSNorm against transformers' Llama norm, and Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import add_rms_norm, rms_norm
from kernels.testing import assert_close, poisoned_allocations, triton_device

EPS = 1e-5
SHAPES = [(1, 16), (7, 63), (3, 5, 100), (33, 576), (0, 64)]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    x, residual = torch.randn(2, *shape) * 3
    weight = torch.rand(shape[-1]) + 0.5
    return [tensor.to(device, dtype) for tensor in (x, residual, weight)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_has_the_rounding_of_llama(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight = make(shape, dtype)
    module = LlamaRMSNorm(shape[-1], EPS).to(dtype)
    module.weight.data.copy_(weight)
    got = rms_norm(x, weight, EPS, backend="torch")
    want = module(x)
    if dtype == torch.float32:
        last_place = want.abs() * torch.finfo(dtype).eps
        assert ((got - want).abs() <= last_place).all()
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_add_rounds_the_sum_first(dtype: torch.dtype) -> None:
    x, residual, weight = make((7, 63), dtype)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, EPS, backend="torch")
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, EPS, backend="torch"))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 4096)])
def test_triton_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = make(shape, dtype, triton_device())
    with poisoned_allocations():
        normed = rms_norm(x, weight, EPS, backend="triton")
        both = add_rms_norm(x, residual, weight, EPS, backend="triton")
    assert_close("rms_norm", normed, rms_norm(x, weight, EPS, backend="torch"), dtype)
    want = add_rms_norm(x, residual, weight, EPS, backend="torch")
    assert torch.equal(both[1], want[1])
    assert_close("add_rms_norm", both[0], want[0], dtype)


@pytest.mark.gpu
def test_triton_takes_rows_that_are_slices() -> None:
    x, _, weight = make((6, 64), torch.float32, triton_device())
    wide = torch.cat((x, x), dim=-1)
    got = rms_norm(wide[:, :64], weight, EPS, backend="triton")
    assert_close("rms_norm", got, rms_norm(x, weight, EPS, backend="torch"), x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 2), (1, 1)])
def test_triton_takes_the_heads_of_fused_qkv(heads: tuple[int, int]) -> None:
    num_heads, num_kv_heads = heads
    size = (num_heads + 2 * num_kv_heads) * 16
    fused, other, _ = make((5, size), torch.float32, triton_device())
    weight = torch.rand(16, device=fused.device)
    q_size, k_size = num_heads * 16, num_kv_heads * 16
    for part in (slice(0, q_size), slice(q_size, q_size + k_size)):
        x, residual = (t[:, part].unflatten(-1, (-1, 16)) for t in (fused, other.contiguous()))
        with poisoned_allocations():
            normed = rms_norm(x, weight, EPS, backend="triton")
            both = add_rms_norm(x, residual, weight, EPS, backend="triton")
        assert_close("rms_norm", normed, rms_norm(x, weight, EPS, backend="torch"), x.dtype)
        want = add_rms_norm(x, residual, weight, EPS, backend="torch")
        assert torch.equal(both[1], want[1])
        assert_close("add_rms_norm", both[0], want[0], x.dtype)
