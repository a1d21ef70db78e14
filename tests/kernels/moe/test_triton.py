"""The Triton kernels of experts against the reference, and what they promise of bits and graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.moe import norm_and_route, route, run_experts
from kernels.moe.plan import (
    ByPair,
    ByTile,
    Config,
    Gemv,
    Logits,
    Tile,
    choose,
    choose_logits,
    num_tiles,
)
from kernels.routing import RoutingRule
from kernels.testing import assert_close, poisoned_allocations, triton_device
from tests.kernels.moe.cases import FAMILIES

pytestmark = pytest.mark.gpu

RULES = {name: family.rule for name, family in FAMILIES.items()}
RULES["one"] = RoutingRule(num_experts=1, top_k=1, normalised=True)
RULES["v2 at its size"] = RoutingRule(
    num_experts=160, top_k=6, wide_logits=True, group_score="max", num_groups=8, top_groups=3
)
CONFIGS: list[Config] = [
    ByPair(Gemv(2, 1), Gemv(4, 1)),
    ByTile(16, Tile(16, 32, 4, 2), Tile(32, 16, 4, 2)),
    ByTile(32, Tile(32, 16, 4, 3), Tile(16, 32, 4, 3)),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(triton_device())


def chosen(rows: int, experts: int, top_k: int, *, skew: float = 0.0) -> torch.Tensor:
    """Ids of which no token has one twice; `skew` makes the first experts the most frequent."""
    generator = torch.Generator().manual_seed(rows)
    liking = torch.rand(rows, experts, generator=generator)
    liking -= skew * torch.arange(experts) / experts
    return liking.argsort(-1, descending=True)[:, :top_k].int().to(triton_device())


def weights_of(experts: int, hidden: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down."""
    return (
        drawn(experts, 2 * inner, hidden, seed=1) * hidden**-0.5,
        drawn(experts, hidden, inner, seed=2) * inner**-0.5,
    )


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize("name", RULES)
def test_routes_are_those_of_the_reference(name: str, rows: int) -> None:
    rule = RULES[name]
    x, gate = drawn(rows, 100), drawn(rule.num_experts, 100, seed=1) * 0.15
    bias = drawn(rule.num_experts, seed=2) * 0.2 if rule.score == "sigmoid" else None
    with poisoned_allocations():
        got = route(x, gate, rule, bias_N=bias, backend="triton")
    want = route(x, gate, rule, bias_N=bias, backend="torch")
    assert torch.equal(got.ids_TK, want.ids_TK)
    assert_close(name, got.weights_TK, want.weights_TK, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("hidden", [100, 1300])
def test_a_norm_before_the_route_is_that_of_the_reference(hidden: int, rows: int) -> None:
    rule = RULES["qwen3"]
    total, weight = drawn(rows + 2, hidden)[1:-1], drawn(hidden, seed=3)
    gate = drawn(rule.num_experts, hidden, seed=1) * hidden**-0.5
    filled = torch.tensor([max(rows - 1, 1)], dtype=torch.int32, device=triton_device())
    args = (total, weight, 1e-5, gate, rule)
    with poisoned_allocations():
        x, got = norm_and_route(*args, num_rows=filled, backend="triton")
    want_x, want = norm_and_route(*args, num_rows=filled, backend="torch")
    assert_close("x", x, want_x, torch.float32)
    assert torch.equal(got.ids_TK, want.ids_TK)
    assert_close("weights", got.weights_TK, want.weights_TK, torch.float32)


@pytest.mark.parametrize("name", ["qwen3", "deepseek v2", "deepseek v3"])
def test_equal_scores_go_to_the_lowest_ids(name: str) -> None:
    rule = RULES[name]
    x, gate = drawn(2, 32).abs(), torch.zeros(rule.num_experts, 32, device=triton_device())
    got = route(x, gate, rule, backend="triton")
    want = route(x, gate, rule, backend="torch")
    assert got.ids_TK.tolist() == [list(range(rule.top_k))] * 2
    assert_close(name, got.weights_TK, want.weights_TK, torch.float32)


# The interpreter warns of what a GPU takes as it comes.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek v2", "deepseek v3"])
def test_a_row_that_is_no_number_has_valid_experts(name: str) -> None:
    rule = RULES[name]
    x, gate = drawn(3, 32), drawn(rule.num_experts, 32, seed=1)
    x[1, 5] = float("nan")
    got = route(x, gate, rule, backend="triton")
    for ids in got.ids_TK.tolist():
        assert len(set(ids)) == rule.top_k and all(0 <= i < rule.num_experts for i in ids)
    assert got.weights_TK[1].isnan().all() and got.weights_TK[::2].isfinite().all()


@pytest.mark.parametrize("name", ["qwen3", "deepseek v3"])
def test_rows_that_fill_a_graph_have_no_experts(name: str) -> None:
    rule = RULES[name]
    x, gate = drawn(5, 32), drawn(rule.num_experts, 32, seed=1)
    x[3:] = float("nan")
    num_rows = torch.tensor([3], dtype=torch.int32, device=triton_device())
    with poisoned_allocations():
        got = route(x, gate, rule, num_rows=num_rows, backend="triton")
    want = route(x, gate, rule, num_rows=num_rows, backend="torch")
    assert torch.equal(got.ids_TK, want.ids_TK)
    assert_close(name, got.weights_TK, want.weights_TK, torch.float32)


@pytest.mark.parametrize("hidden", [100, 1300])
def test_parts_of_logits_add_up_to_the_product(hidden: int) -> None:
    from kernels.moe.route_triton import logits_parts

    x, gate = drawn(35, hidden), drawn(20, hidden, seed=1) * hidden**-0.5
    alike = []
    for apart in (True, False):
        config = Logits(block_t=16, block_n=16, block_i=64, part=512, apart=apart, warps=1)
        with poisoned_allocations():
            parts = logits_parts(x, gate, config)
        assert len(parts) == (-(-hidden // 512) if apart else 1)
        total = torch.zeros_like(parts[0])
        for part in parts:
            total += part
        assert_close("logits", total, x @ gate.T, torch.float32)
        alike.append(total)
    assert torch.equal(*alike)


@pytest.mark.parametrize("block_p", [16, 64])
@pytest.mark.parametrize(
    ("rows", "slots", "first_slot", "experts"),
    [(1, 8, 0, 8), (5, 8, 0, 8), (70, 7, 0, 7), (70, 4, 4, 8), (9, 3, 6, 8), (300, 5, 2, 8)],
)
def test_pairs_are_sorted_into_tiles(
    rows: int, slots: int, first_slot: int, experts: int, block_p: int
) -> None:
    from kernels.moe.triton import sort

    ids = chosen(rows, experts, 3, skew=0.5)
    ids[rows // 2] = -1
    with poisoned_allocations():
        order, tiles = sort(ids, first_slot, slots, block_p)
    assert len(tiles) == num_tiles(rows * 3, slots, block_p)
    flat = ids.flatten().tolist()
    want = [
        (slot, [pair for pair, expert in enumerate(flat) if expert == first_slot + slot])
        for slot in range(slots)
    ]
    found: list[tuple[int, list[int]]] = [(slot, []) for slot in range(slots)]
    for slot, begin, end in tiles.tolist():
        if slot >= 0:
            assert 0 < end - begin <= block_p
            found[slot][1].extend(order[begin:end].tolist())
    assert found == want


def test_more_pairs_than_a_block_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks that tests can fill; the order is the same."""
    from kernels.moe import triton

    ids = chosen(700, 6, 2, skew=0.3)
    want = triton.sort(ids, 1, 4, 16)
    monkeypatch.setattr(triton, "FEW_PAIRS", 256)
    monkeypatch.setattr(triton, "SORT_BLOCK", 256)
    with poisoned_allocations():
        got = triton.sort(ids, 1, 4, 16)
    held = int(((ids >= 1) & (ids < 5)).sum())
    assert torch.equal(got[0][:held], want[0][:held])
    assert torch.equal(got[1][got[1][:, 0] >= 0], want[1][want[1][:, 0] >= 0])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 60])
@pytest.mark.parametrize("shape", [(64, 32), (100, 63)])
def test_experts_give_what_those_of_the_reference_give(
    shape: tuple[int, int], rows: int, rounded: bool
) -> None:
    x, factors = drawn(rows, shape[0] + 8)[:, : shape[0]], drawn(rows, 3, seed=3).abs()
    gate_up, down = weights_of(7, *shape)
    ids = chosen(rows, 7, 3, skew=1.0)
    more = {
        "added_TH": drawn(rows, shape[0], seed=4),
        "residual_TH": drawn(rows, shape[0] + 8, seed=5)[:, 8:],
    }
    if rounded:
        # One expert of a row is no one's, and one row has none at all.
        more.pop("added_TH")
        ids[rows // 2 :: 3] = -1
        ids[: rows // 3, 1] = -1
    with poisoned_allocations():
        got = run_experts(x, gate_up, down, ids, factors, **more, backend="triton")
    want = run_experts(x, gate_up, down, ids, factors, **more, backend="torch")
    assert_close("rows", got, want, torch.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=["pairs", "16", "32"])
@pytest.mark.parametrize("rows", [1, 9, 50])
def test_every_configuration_gives_the_same(config: Config, rows: int) -> None:
    from kernels.moe.triton import products

    x, (gate_up, down) = drawn(rows, 96), weights_of(4, 96, 48)
    ids = chosen(rows, 8, 3)
    with poisoned_allocations():
        got = products(x, gate_up, down, ids, 2, config).view(rows, 3, -1)
    held = (ids >= 2) & (ids < 6)
    assert got[~held].isnan().all()
    for slot in range(4):
        row, place = (ids == slot + 2).nonzero(as_tuple=True)
        gate, up = (x[row] @ gate_up[slot].T).chunk(2, dim=-1)
        want = (torch.nn.functional.silu(gate) * up) @ down[slot].T
        assert_close(f"slot {slot}", got[row, place], want, torch.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=["pairs", "16", "32"])
def test_a_row_gets_the_same_bits_whoever_is_beside_it(config: Config) -> None:
    from kernels.moe.triton import products

    count = 20 if triton_device() == "cpu" else 400
    x, (gate_up, down) = drawn(count, 64), weights_of(3, 64, 32)
    ids = chosen(count, 3, 2)
    full = products(x, gate_up, down, ids, 0, config).view(count, 2, -1)
    for rows in (1, 7, 19):
        part = products(x[:rows], gate_up, down, ids[:rows], 0, config)
        assert torch.equal(part.view(rows, 2, -1), full[:rows])
    if triton_device() == "cuda":
        # In other columns of a tile; those of the interpreter's products are not summed alike.
        back = products(x.flip(0), gate_up, down, ids.flip(0), 0, config)
        assert torch.equal(back.view(count, 2, -1).flip(0), full)


@pytest.mark.parametrize("rows", [2, 40])
def test_ranks_add_up_and_read_no_weight_that_no_token_needs(rows: int) -> None:
    x, (gate_up, down), ids = drawn(rows, 64), weights_of(8, 64, 32), chosen(rows, 8, 3) % 6
    factors = drawn(rows, 3, seed=3).abs()
    whole = run_experts(x, gate_up, down, ids, factors, backend="torch")
    gate_up[6:], down[6:] = float("nan"), float("nan")
    parts = [
        run_experts(
            x,
            gate_up[first : first + 4],
            down[first : first + 4],
            ids,
            factors,
            first_slot=first,
            num_experts=8,
            backend="triton",
        )
        for first in (0, 4)
    ]
    assert_close("sum of ranks", parts[0] + parts[1], whole, torch.float32)


@pytest.mark.parametrize("rounded", [False, True])
def test_few_rows_of_16_bits_are_combined_to_the_bits_of_the_reference(rounded: bool) -> None:
    """In float16, which the interpreter rounds as a GPU does."""
    from kernels.moe.triton import products

    x, factors = drawn(4, 64).half(), drawn(4, 3, seed=3).abs()
    gate_up, down = (weight.half() for weight in weights_of(6, 64, 32))
    factors = factors.half() if rounded else factors
    ids, added, residual = chosen(4, 6, 3), *drawn(2, 4, 64, seed=4).half()
    ids[1, 2] = -1
    got = run_experts(
        x, gate_up, down, ids, factors, added_TH=added, residual_TH=residual, backend="triton"
    )
    config = choose(4, 3, 6, 64, 32)
    weighted = products(x, gate_up, down, ids, 0, config).view(4, 3, -1) * factors[:, :, None]
    total = torch.zeros(4, 64, device=triton_device())
    for place in range(3):
        total += weighted[:, place].float().where(ids[:, place, None] >= 0, 0.0)
    assert torch.equal(got, residual + (total.half() + added))
    want = run_experts(
        x, gate_up, down, ids, factors, added_TH=added, residual_TH=residual, backend="torch"
    )
    assert_close("rows", got, want, torch.float16)


QWEN = RoutingRule(num_experts=128, top_k=8, normalised=True, rounded_weights=True)


@pytest.mark.parametrize("rule", [QWEN, replace(QWEN, rounded_weights=False, wide_logits=True)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 17, 128, 1024, 4097])
def test_16_bits_at_the_size_of_a_model(rows: int, rule: RoutingRule) -> None:
    """A quarter of the experts of Qwen3-30B-A3B, at its widths, against the reference on the GPU;
    repeated and replayed from a graph, whose rows fill up with none, to the bit."""
    if triton_device() == "cpu":
        pytest.skip("the interpreter cannot multiply matrices of bfloat16")
    x = drawn(rows, 2048).bfloat16()
    gate = (drawn(128, 2048, seed=9) * 2048**-0.5).bfloat16()
    gate_up, down = (weight.bfloat16() for weight in weights_of(32, 2048, 768))
    num_rows = torch.tensor([rows], dtype=torch.int32, device="cuda")

    def layer() -> tuple[torch.Tensor, ...]:
        routed = route(x, gate, rule, num_rows=num_rows, backend="triton")
        out = run_experts(
            x, gate_up, down, *routed, first_slot=32, num_experts=128, backend="triton"
        )
        return *routed, out

    with poisoned_allocations():
        ids, factors, out = layer()
    want = run_experts(x, gate_up, down, ids, factors, first_slot=32, backend="torch")
    # Rounded in between as the reference, after sums in another order.
    assert ((out - want).abs() <= 0.01 + 0.03 * want.abs()).all()
    assert all(torch.equal(a, b) for a, b in zip(layer(), (ids, factors, out), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layer()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, (ids, factors, out), strict=True))
    num_rows.fill_(rows // 2)
    graph.replay()
    assert torch.equal(replayed[2][: rows // 2], out[: rows // 2])
    assert not replayed[2][rows // 2 :].any() and (replayed[0][rows // 2 :] == -1).all()


def test_16_bit_logits_are_near_the_exact_ones_and_the_same_in_any_batch() -> None:
    if triton_device() == "cpu":
        pytest.skip("the interpreter cannot multiply matrices of bfloat16")
    from kernels.moe.route_triton import logits_parts

    x = drawn(4097, 7168).bfloat16()
    gate = (drawn(256, 7168, seed=9) * 7168**-0.5).bfloat16()
    (full,) = logits_parts(x, gate, choose_logits(len(x)))
    assert (full.double() - x.double() @ gate.double().T).abs().max() < 1e-4
    for rows in (1, 17, 64, 65, 1000):
        total = torch.zeros_like(full[:rows])
        for part in logits_parts(x[:rows], gate, choose_logits(rows)):
            total += part
        assert torch.equal(total, full[:rows])
