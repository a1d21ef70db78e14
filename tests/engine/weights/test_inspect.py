"""Checksums, snapshots and single values of the live weights."""

from __future__ import annotations

import pytest
import torch

from engine.errors import (
    InvalidRequest,
    ManifestMismatch,
    MemoryReleased,
    UpdateOrder,
    WeightUpdateError,
)
from engine.protocol import AbortUpdate, BeginUpdate, CheckWeights, CommitUpdate, GetWeight
from engine.weights.checksum import checksum
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


def ask(rank, command):
    [report] = rank.handle(command).weights
    return report


def test_checksums_are_those_of_each_tensor_as_it_is_stored() -> None:
    model, rank = make_rank(1, 2, dtype=torch.bfloat16)
    report = ask(rank, CheckWeights(action="checksum"))
    assert report.rank == 1
    assert report.checksums == {name: checksum(t) for name, t in contents(model).items()}


def test_an_update_that_misses_a_tensor_shows_in_a_comparison() -> None:
    model, rank = make_rank()
    old = contents(model)
    ask(rank, CheckWeights(action="snapshot"))
    assert ask(rank, CheckWeights(action="compare")).differing == []
    ask(rank, CheckWeights(action="reset_tensors"))
    assert sorted(ask(rank, CheckWeights(action="compare")).differing) == sorted(old)
    rank.handle(BeginUpdate(version=4, partial=True))
    rank.session.receive((name, tensor) for name, tensor in old.items() if name != NORM)
    with pytest.raises(ManifestMismatch) as refused:
        rank.handle(CommitUpdate(version=4))
    assert refused.value.field == NORM
    with pytest.raises(WeightUpdateError, match="reset_tensors"):
        rank.session.require_servable()
    rank.session.receive([(NORM, old[NORM])])
    rank.handle(CommitUpdate(version=4))
    rank.session.require_servable()
    assert ask(rank, CheckWeights(action="compare")).differing == []


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_reset_is_refused_while_an_update_is_open(mode: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    rank.handle(BeginUpdate(version=4, mode=mode))
    rank.session.receive([(NORM, new[NORM])])
    with pytest.raises(UpdateOrder, match="version 4 is open"):
        rank.handle(CheckWeights(action="reset_tensors"))
    ask(rank, CheckWeights(action="snapshot"))
    rank.handle(AbortUpdate(version=4))
    if mode != "in_place":
        assert_holds(model, before)


def test_a_comparison_needs_a_snapshot() -> None:
    _, rank = make_rank()
    with pytest.raises(UpdateOrder, match="snapshot"):
        rank.handle(CheckWeights(action="compare"))


@pytest.mark.parametrize("count", [0, 1, 17, 100, 10_000])
def test_values_of_a_tensor(count: int) -> None:
    model, rank = make_rank()
    want = contents(model)[EMBED].reshape(-1)[:count].tolist()
    assert ask(rank, GetWeight(name=EMBED, count=count)).values == want
    assert ask(rank, GetWeight(name="lm_head.weight", count=count)).values == want


def test_values_of_a_column_slice_are_this_rank_s() -> None:
    _, rank = make_rank(1, 2)
    name = "model.layers.0.self_attn.o_proj.weight"
    want = fresh(make_rank()[0], seed=0)[name][:, 8:]
    assert ask(rank, GetWeight(name=name, count=12)).values == want.reshape(-1)[:12].tolist()


def test_a_name_or_count_that_is_none() -> None:
    _, rank = make_rank()
    with pytest.raises(InvalidRequest, match=r"model.nothing") as refusal:
        rank.handle(GetWeight(name="model.nothing"))
    assert refusal.value.field == "name"
    with pytest.raises(InvalidRequest, match="-1"):
        rank.handle(GetWeight(name=NORM, count=-1))


def test_released_weights_cannot_be_looked_at() -> None:
    def released() -> None:
        raise MemoryReleased("weights are released; resume 'weights' first")

    _, rank = make_rank(require_weights=released)
    for command in (CheckWeights(), GetWeight(name=NORM)):
        with pytest.raises(MemoryReleased):
            rank.handle(command)
