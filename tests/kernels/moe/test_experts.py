"""Experts against those of transformers, and against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.moe import Routed, route, run_experts
from kernels.testing import assert_close
from tests.kernels.moe.cases import FAMILIES, added_by, bias_of, tokens

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_gives_what_that_of_transformers_gives(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    block, x = family.build(dtype), tokens(67, dtype)
    _, weights, ids = block.gate(x)
    got = run_experts(
        x,
        block.experts.gate_up_proj,
        block.experts.down_proj,
        ids.int(),
        weights,
        added_TH=added_by(block, x),
        backend="torch",
    )
    assert_close(name, got, block(x[None])[0], dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_router_and_experts_together_are_the_block(name: str) -> None:
    """In float32, where no two scores are equal."""
    family = FAMILIES[name]
    block, x = family.build(torch.float32), tokens(67, torch.float32)
    ids, weights = route(x, block.gate.weight, family.rule, bias_N=bias_of(block), backend="torch")
    got = run_experts(
        x,
        block.experts.gate_up_proj,
        block.experts.down_proj,
        ids,
        weights,
        added_TH=added_by(block, x),
        backend="torch",
    )
    assert_close(name, got, block(x[None])[0], torch.float32)


def some(rows: int, experts: int, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, both weights, ids without repetition in a row, weights."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 24, generator=generator).to(dtype)
    gate_up = torch.randn(experts, 2 * 10, 24, generator=generator).to(dtype) * 0.2
    down = torch.randn(experts, 24, 10, generator=generator).to(dtype) * 0.3
    ids = torch.rand(rows, experts, generator=generator).argsort(-1)[:, :top_k].int()
    return x, gate_up, down, ids, torch.rand(rows, top_k, generator=generator)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding_is_where_it_is_promised(dtype: torch.dtype, rounded: bool) -> None:
    """A token and an expert at a time, to the bit in 16 of them: products are sums that float32
    holds exactly, in any order."""
    x, gate_up, down, ids, weights = some(9, 5, 3, dtype)
    x, gate_up = (x * 4).round() / 4, (gate_up * 8).round() / 8
    down = down * torch.eye(10, dtype=dtype).repeat(3, 1)[:24]
    weights = weights.to(dtype) if rounded else weights
    added, residual = torch.randn(2, *x.shape).to(dtype)
    want = []
    for row, (experts, factors) in enumerate(zip(ids.tolist(), weights, strict=True)):
        total = torch.zeros(24)
        for expert, factor in zip(experts, factors, strict=True):
            gate, up = F.linear(x[row], gate_up[expert]).chunk(2)
            inner = F.silu(gate) * up
            wide = F.linear(inner, down[expert]) * factor[None]
            total += wide.float()
        want.append(residual[row] + (total.to(dtype) + added[row]))
    got = run_experts(
        x,
        gate_up,
        down,
        ids,
        weights,
        added_TH=added,
        residual_TH=residual,
        backend="torch",
    )
    assert_close("rows", got, torch.stack(want), dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(got, torch.stack(want))


def test_ranks_add_up_to_the_whole() -> None:
    """Seven experts on two ranks, the shared expert's part on the first."""
    x, gate_up, down, ids, weights = some(11, 7, 3, torch.float32)
    added = torch.randn_like(x)
    whole = run_experts(x, gate_up, down, ids, weights, added_TH=added, backend="torch")
    parts = [
        run_experts(
            x,
            gate_up[held],
            down[held],
            ids,
            weights,
            first_slot=held.start,
            added_TH=added if held.start == 0 else None,
            backend="torch",
        )
        for held in (slice(0, 4), slice(4, 7))
    ]
    assert_close("sum of ranks", parts[0] + parts[1], whole, torch.float32)


def test_what_no_slot_holds_adds_nothing_whatever_its_weight() -> None:
    x, gate_up, down, ids, weights = some(6, 4, 2, torch.float32)
    ids[1, 0], ids[2], ids[4, 1] = -1, -1, 9
    weights[ids < 0] = float("nan")
    got = run_experts(x, gate_up, down, ids, weights, backend="torch")
    assert got.isfinite().all() and not got[2].any()
    alone = run_experts(x[1:2], gate_up, down, ids[1:2, 1:], weights[1:2, 1:], backend="torch")
    assert_close("one expert", got[1:2], alone, torch.float32)


def test_experts_that_no_token_goes_to_are_not_read() -> None:
    x, gate_up, down, ids, weights = some(5, 6, 2, torch.float32)
    ids = ids % 3
    gate_up[3:], down[3:] = float("nan"), float("nan")
    assert run_experts(x, gate_up, down, ids, weights, backend="torch").isfinite().all()


def test_no_row_gives_no_row() -> None:
    x, gate_up, down, ids, weights = some(1, 4, 2, torch.float32)
    nothing = Routed(ids[:0], weights[:0])
    assert run_experts(x[:0], gate_up, down, *nothing, backend="torch").shape == (0, 24)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="numpy"):
        run_experts(*some(1, 4, 2, torch.float32), backend="numpy")  # type: ignore[arg-type]
