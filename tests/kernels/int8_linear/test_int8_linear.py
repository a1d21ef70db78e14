"""Products of int8 rows: exact integers, one arithmetic on every backend and for any rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.int8_linear import int8_linear
from kernels.int8_linear.plan import Gemm, Tiles, Vendor, choose
from kernels.int8_linear.reference import integer_product
from kernels.linear import Options, new_counters
from kernels.quant.rows import quantize_rows
from kernels.testing import poisoned_allocations, triton_device

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "residual": {"residual": True},
    "both": {"bias": True, "residual": True},
    "split": {"split": True, "bias": True, "residual": True},
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(
    rows: int,
    outs: int,
    ins: int,
    device: str,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    **how: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Options]:
    """x, the weight, its scales, and what surrounds the product."""
    weight, scale = quantize_rows(drawn(outs, ins, seed=1) * 0.05, backend="torch")
    x = drawn(rows, ins, seed=2).to(device, dtype)
    bias = drawn(outs, seed=3).to(device, dtype) if how.get("bias") else None
    residual = drawn(rows, outs, seed=4).to(device, dtype) if how.get("residual") else None
    counters = new_counters(torch.device(device)) if how.get("split") else None
    options = Options(bias_O=bias, residual_RO=residual, counters=counters, gated=gated)
    return x, weight.to(device), scale.to(device), options


@pytest.mark.parametrize("ins", [1, 63, 1024, 5000])
def test_integers_are_summed_exactly(ins: int) -> None:
    """The largest sums there are, and random ones."""
    generator = torch.Generator().manual_seed(ins)
    x = torch.randint(-127, 128, (5, ins), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (7, ins), generator=generator, dtype=torch.int8)
    x[0], weight[0] = 127, 127
    x[1], weight[1] = -127, 127
    assert torch.equal(integer_product(x, weight).long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_product_of_what_is_stored(name: str) -> None:
    x, weight, scale, options = case(6, 24, 50, "cpu", torch.float32, **CASES[name])
    got = int8_linear(x, weight, scale, options, backend="torch")
    quantized, scale_R = quantize_rows(x, backend="torch")
    dequantized = quantized.double() * scale_R.double()[:, None]
    want = dequantized @ (weight.double() * scale.double()[:, None]).T
    for term in (options.bias_O, options.residual_RO):
        want = want if term is None else want + term.double()
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_quantising_costs_a_hundredth_of_the_product() -> None:
    x, weight = drawn(8, 512, seed=2), drawn(64, 512, seed=1) * 0.05
    quantized, scale = quantize_rows(weight, backend="torch")
    got = int8_linear(x, quantized, scale, backend="torch")
    want = x @ weight.T
    assert ((got - want).norm() / want.norm()) < 0.015


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_the_same_in_any_batch(gated: bool) -> None:
    x, weight, scale, _ = case(9, 24, 50, "cpu", torch.bfloat16)
    options = Options(gated=gated)
    together = int8_linear(x, weight, scale, options, backend="torch")
    for row in range(len(x)):
        alone = int8_linear(x[row : row + 1], weight, scale, options, backend="torch")
        assert torch.equal(alone[0], together[row])


def test_an_unknown_backend_is_refused() -> None:
    x, weight, scale, _ = case(1, 2, 3, "cpu", torch.float32)
    with pytest.raises(ValueError, match="cublas"):
        int8_linear(x, weight, scale, backend="cublas")  # type: ignore[arg-type]


def test_the_plan_fits_every_shape() -> None:
    for rows in (1, 16, 17, 64, 65, 1024):
        for outs, ins in ((4096, 4096), (6144, 4096), (4096, 14336), (63, 100)):
            config = choose(rows, outs, ins, gated=False, can_split=True)
            assert isinstance(config, Tiles) == (rows <= 16)
            if isinstance(config, Vendor):
                assert outs % 8 == 0 and ins % 8 == 0
            if isinstance(config, Tiles):
                assert -(-ins // config.block_i) % config.splits == 0
                assert -(-outs // config.block_o) <= 1024
    assert choose(4, 4096, 4096, gated=False, can_split=False).splits == 1  # type: ignore[union-attr]
    assert isinstance(choose(1024, 63, 100, gated=False, can_split=False), Gemm)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, 63, 100, 300])
@pytest.mark.parametrize(("outs", "ins"), [(64, 512), (100, 63), (136, 1000)])
def test_a_gpu_has_the_bits_of_the_reference(rows: int, outs: int, ins: int, name: str) -> None:
    device = triton_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight, scale, options = case(rows, outs, ins, device, dtype, **CASES[name])
    with poisoned_allocations():
        got = int8_linear(x, weight, scale, options, backend="triton")
    home = Options(
        bias_O=None if options.bias_O is None else options.bias_O.cpu(),
        residual_RO=None if options.residual_RO is None else options.residual_RO.cpu(),
    )
    want = int8_linear(x.cpu(), weight.cpu(), scale.cpu(), home, backend="torch")
    assert torch.equal(got.cpu(), want)
    if options.counters is not None:
        assert not options.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_a_gated_product_is_near_that_of_the_reference(rows: int) -> None:
    device = triton_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight, scale, options = case(rows, 2 * 96, 320, device, dtype, gated=True)
    norm = (1 + 0.1 * drawn(320, seed=9)).to(device, dtype)
    options = Options(gated=True, norm_weight_I=norm, eps=1e-6)
    got = int8_linear(x, weight, scale, options, backend="triton").cpu()
    home = Options(gated=True, norm_weight_I=norm.cpu(), eps=1e-6)
    want = int8_linear(x.cpu(), weight.cpu(), scale.cpu(), home, backend="torch")
    torch.testing.assert_close(got, want, atol=0.03, rtol=0.03)
