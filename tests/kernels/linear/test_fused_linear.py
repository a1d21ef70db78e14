"""Fused products against float64, and the Triton kernels against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.linear import Options, fused_linear, new_counters, reference
from kernels.linear.plan import MAX_GEMV_ROWS, MAX_ROWS, Config, Gemv, Tiles, choose
from kernels.testing import assert_close, poisoned_allocations, triton_device

EPS = 1e-5
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "norm and bias": {"norm": True, "bias": True},
    "gated": {"gated": True},
    "norm, gated, bias": {"norm": True, "gated": True, "bias": True},
    "residual": {"residual": True},
    "bias, residual": {"bias": True, "residual": True},
}


def make(
    rows: int,
    outs: int,
    ins: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: bool = False,
    norm: bool = False,
    gated: bool = False,
    residual: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Options]:
    """x and the residual are slices of wider tensors."""
    features = outs * (2 if gated else 1)
    x = torch.randn(rows, ins + 16).to(device, dtype)[:, :ins]
    weight = (torch.randn(features, ins) * ins**-0.5).to(device, dtype)
    wide = torch.randn(rows, outs + 8).to(device, dtype)
    options = Options(
        bias_O=torch.randn(features).to(device, dtype) if bias else None,
        norm_weight_I=(torch.rand(ins) + 0.5).to(device, dtype) if norm else None,
        eps=EPS,
        gated=gated,
        residual_RO=wide[:, :outs] if residual else None,
        counters=new_counters(torch.device(device)),
    )
    return x, weight, options


def exact(x: torch.Tensor, weight: torch.Tensor, options: Options) -> torch.Tensor:
    """Everything in float64."""

    def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.double()

    options = replace(
        options,
        bias_O=wide(options.bias_O),
        norm_weight_I=wide(options.norm_weight_I),
        residual_RO=wide(options.residual_RO),
    )
    x, weight = x.double(), weight.double()
    if options.norm_weight_I is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * options.norm_weight_I
    out = x @ weight.T
    if options.bias_O is not None:
        out = out + options.bias_O
    if options.gated:
        gate, up = out.chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * up
    return out if options.residual_RO is None else out + options.residual_RO


@pytest.mark.parametrize("kind", KINDS)
def test_reference_computes_the_formula(kind: str) -> None:
    x, weight, options = make(5, 12, 63, **KINDS[kind])
    got = fused_linear(x, weight, options, backend="torch")
    assert_close(kind, got.double(), exact(x, weight, options), torch.float32)


def test_without_options_it_is_a_product() -> None:
    x, weight, _ = make(3, 8, 5)
    assert torch.equal(
        fused_linear(x, weight, backend="torch"), torch.nn.functional.linear(x, weight)
    )


def test_unknown_backend_lists_the_known_ones() -> None:
    x, weight, _ = make(1, 2, 3)
    with pytest.raises(ValueError, match="torch, triton; got 'numpy'"):
        fused_linear(x, weight, backend="numpy")


@pytest.mark.parametrize("can_split", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (2048, 1536), (8960, 1536), (1536, 8960), (96, 64)])
def test_the_plan_covers_few_rows_only(
    shape: tuple[int, int], gated: bool, can_split: bool
) -> None:
    plans = [
        choose(rows, *shape, gated=gated, can_split=can_split) for rows in range(1, MAX_ROWS + 1)
    ]
    few = plans[:MAX_GEMV_ROWS]
    assert all(isinstance(config, Gemv) for config in few)
    orders = {config.warps for config in few}
    assert len(orders) == 1, "what a row gets would depend on the number of rows"
    several = set(plans[MAX_GEMV_ROWS:])
    assert len(several) == 1, "what a row gets would depend on the number of rows"
    config = several.pop()
    assert isinstance(config, Tiles)
    if gated or not can_split:
        assert config.splits == 1
    for rows in (0, MAX_ROWS + 1):
        assert choose(rows, *shape, gated=gated, can_split=can_split) is None


def run_config(
    x: torch.Tensor, weight: torch.Tensor, options: Options, config: Config | None
) -> torch.Tensor:
    from kernels.linear.triton import with_config

    with poisoned_allocations():
        return with_config(x, weight, options, config)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [Gemv(4, 1), Gemv(2, 2, stages=1, unroll=2), Gemv(1, 1, 3)])
@pytest.mark.parametrize("shape", [(63, 100), (33, 1030)])
def test_one_row_matches_the_reference(shape: tuple[int, int], config: Gemv, kind: str) -> None:
    x, weight, options = make(1, *shape, device=triton_device(), **KINDS[kind])
    want = reference.fused_linear(x, weight, options)
    assert_close(kind, run_config(x, weight, options, config), want, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ins", [1040, 1536])
def test_two_rows_get_what_each_gets_alone(ins: int, kind: str) -> None:
    """Enough outputs that sums in another order would show through the rounding."""
    device = triton_device()
    outs = 63 if device == "cpu" else 20_000
    x, weight, options = make(MAX_GEMV_ROWS, outs, ins, torch.float16, device, **KINDS[kind])
    gated = options.gated
    together = run_config(
        x, weight, options, choose(len(x), outs, ins, gated=gated, can_split=True)
    )
    for row in range(len(x)):
        residual = options.residual_RO
        alone = replace(options, residual_RO=None if residual is None else residual[row : row + 1])
        one = choose(1, outs, ins, gated=gated, can_split=True)
        assert torch.equal(run_config(x[row : row + 1], weight, alone, one)[0], together[row])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [Tiles(32, 64, 4, 3), Tiles(16, 32, 4, 2, splits=3)])
@pytest.mark.parametrize("shape", [(5, 63, 100), (16, 40, 256)])
def test_few_rows_match_the_reference(
    shape: tuple[int, int, int], config: Tiles, kind: str
) -> None:
    if KINDS[kind].get("gated"):
        config = replace(config, splits=1)
    x, weight, options = make(*shape, device=triton_device(), **KINDS[kind])
    want = reference.fused_linear(x, weight, options)
    for _ in range(2):
        assert_close(kind, run_config(x, weight, options, config), want, torch.float32)
        assert options.counters is not None and not options.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
def test_what_a_row_gets_does_not_depend_on_the_rows_beside_it(splits: int) -> None:
    config = Tiles(32, 64, 4, 3, splits)
    x, weight, options = make(16, 48, 400, device=triton_device(), bias=True)
    full = run_config(x, weight, options, config)
    for rows in (2, 7, 15):
        assert torch.equal(run_config(x[:rows], weight, options, config), full[:rows])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 16, 17, 40])
@pytest.mark.parametrize("shape", [(2048, 1536), (1536, 8960), (100, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_as_the_engine_calls_it(
    dtype: torch.dtype, shape: tuple[int, int], rows: int, kind: str
) -> None:
    if triton_device() == "cpu":
        pytest.skip("the interpreter cannot multiply matrices of bfloat16")
    x, weight, options = make(rows, *shape, dtype, "cuda", **KINDS[kind])
    with poisoned_allocations():
        got = fused_linear(x, weight, options, backend="triton")
    # Rounded in between as separate ops round, so wider than one rounding of the exact value.
    finer = 8 if dtype == torch.float16 else 1
    want, absolute, relative = exact(x, weight, options), 0.06 / finer, 0.03 / finer
    assert ((got.double() - want).abs() <= absolute + relative * want.abs()).all()
    assert torch.equal(fused_linear(x, weight, options, backend="triton"), got)
