"""Routers against those of transformers, and what transformers leaves open."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.moe import route
from kernels.routing import RoutingRule
from kernels.testing import assert_close
from tests.kernels.moe.cases import FAMILIES, bias_of, tokens

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_routes_as_transformers_does(name: str, dtype: torch.dtype) -> None:
    """Ids may change places where scores are equal; the weight of every expert may not."""
    family = FAMILIES[name]
    block, x = family.build(dtype), tokens(200, dtype)
    got = route(x, block.gate.weight, family.rule, bias_N=bias_of(block), backend="torch")
    logits, weights, ids = block.gate(x)
    assert got.weights_TK.dtype == weights.dtype and got.ids_TK.dtype == torch.int32
    rows = clear(logits, got.ids_TK, ids)
    assert rows.float().mean() > 0.8
    assert_close(
        name, spread(got.ids_TK, got.weights_TK)[rows], spread(ids, weights)[rows], torch.float32
    )


def clear(logits: torch.Tensor, ids: torch.Tensor, other_ids: torch.Tensor) -> torch.Tensor:
    """Rows whose experts are the same set, or where a tie is not what makes them differ."""
    same = (ids.long().sort(-1).values == other_ids.sort(-1).values).all(-1)
    ties = (logits.sort(-1).values.diff(dim=-1) == 0).any(-1)
    return same | ~ties


def spread(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights by expert, 0 where a token does not go."""
    return weights.new_zeros(len(ids), 32).scatter(1, ids.long(), weights)


@pytest.mark.parametrize("name", ["deepseek v3", "glm4"])
def test_a_bias_chooses_and_does_not_weigh(name: str) -> None:
    rule = replace(FAMILIES[name].rule, normalised=False, scale=1.0)
    block, x = FAMILIES[name].build(torch.float32), tokens(200, torch.float32)
    bias = bias_of(block)
    assert bias is not None
    plain = route(x, block.gate.weight, rule, backend="torch")
    biased = route(x, block.gate.weight, rule, bias_N=bias, backend="torch")
    assert not torch.equal(plain.ids_TK, biased.ids_TK)
    scores = (x @ block.gate.weight.T).sigmoid().gather(1, biased.ids_TK.long())
    assert_close(name, biased.weights_TK, scores, torch.float32)


@pytest.mark.parametrize("group_score", ["none", "max", "top2_sum"])
def test_equal_scores_go_to_the_lowest_ids(group_score: str) -> None:
    rule = RoutingRule(
        num_experts=40,
        top_k=6,
        group_score=group_score,  # type: ignore[arg-type]
        num_groups=8,
        top_groups=3,
    )
    got = route(torch.ones(3, 4), torch.zeros(40, 4), rule, backend="torch")
    assert got.ids_TK.tolist() == [list(range(6))] * 3


def test_groups_are_those_of_the_highest_scores() -> None:
    """Expert 0 is the best of all; its group is not, by the sum of two."""
    logits = torch.tensor([3.0, -9.0, 2.0, 2.0, 2.5, 1.0, -1.0, -1.0])
    rule = RoutingRule(
        num_experts=8, top_k=2, score="sigmoid", group_score="top2_sum", num_groups=4, top_groups=1
    )
    x, gate = torch.ones(1, 1), logits[:, None]
    assert route(x, gate, rule, backend="torch").ids_TK.tolist() == [[2, 3]]
    rule = replace(rule, group_score="max", score="softmax")
    assert route(x, gate, rule, backend="torch").ids_TK.tolist() == [[0, 1]]


def test_rows_that_fill_a_graph_have_no_experts() -> None:
    rule = FAMILIES["qwen3"].rule
    x, gate = tokens(6, torch.float32), tokens(8, torch.float32, seed=2)
    x[4:] = float("nan")
    num_rows = torch.tensor([4], dtype=torch.int32)
    got = route(x, gate, rule, num_rows=num_rows, backend="torch")
    want = route(x[:4], gate, rule, backend="torch")
    assert torch.equal(got.ids_TK[:4], want.ids_TK)
    assert torch.equal(got.weights_TK[:4], want.weights_TK)
    assert (got.ids_TK[4:] == -1).all() and (got.weights_TK[4:] == 0).all()


def test_no_row_is_routed_nowhere() -> None:
    got = route(
        torch.ones(0, 4), torch.ones(8, 4), RoutingRule(num_experts=8, top_k=2), backend="torch"
    )
    assert got.ids_TK.shape == got.weights_TK.shape == (0, 2)


def test_an_unknown_backend_is_refused() -> None:
    rule = RoutingRule(num_experts=1, top_k=1)
    with pytest.raises(ValueError, match="numpy"):
        route(torch.ones(1, 1), torch.ones(1, 1), rule, backend="numpy")  # type: ignore[arg-type]
