"""RMSNorm against the norms of transformers, and Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import add_rms_norm, rms_norm
from kernels.testing import assert_close, poisoned_allocations, triton_device
from kernels.weighting import Weighting

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


def module_of(weighting: str, width: int) -> torch.nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    return Gemma3RMSNorm(width, EPS) if weighting == "offset" else Olmo2RMSNorm(width, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["wide", "offset"])
def test_reference_has_the_weighting_of_olmo2_and_gemma3(
    weighting: Weighting, dtype: torch.dtype
) -> None:
    x, residual, weight = make((33, 576), dtype)
    module = module_of(weighting, 576).to(dtype)
    module.weight.data.copy_(weight)
    normed, total = add_rms_norm(x, residual, weight, EPS, weighting=weighting, backend="torch")
    want = module(total)
    assert_close("add_rms_norm", normed, want, dtype)
    if dtype == torch.bfloat16:
        # Rounded in the same places, not merely close.
        assert torch.equal(normed, want)
        rounded = rms_norm(total, weight, EPS, backend="torch")
        assert not torch.equal(normed, rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["wide", "offset"])
def test_triton_weights_as_the_reference(weighting: Weighting, dtype: torch.dtype) -> None:
    x, residual, weight = make((7, 100), dtype, triton_device())
    with poisoned_allocations():
        normed = rms_norm(x, weight, EPS, weighting=weighting, backend="triton")
        both = add_rms_norm(x, residual, weight, EPS, weighting=weighting, backend="triton")
    want = rms_norm(x, weight, EPS, weighting=weighting, backend="torch")
    assert_close("rms_norm", normed, want, dtype)
    want, total = add_rms_norm(x, residual, weight, EPS, weighting=weighting, backend="torch")
    assert torch.equal(both[1], total)
    assert_close("add_rms_norm", both[0], want, dtype)


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
