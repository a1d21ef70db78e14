"""Messages that arrive in the live weights themselves: the same bits, and what a failure leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import GroupError, NoVersion
from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate
from engine.weights.initial import load_initial
from tests.helpers.excerpt_senders import cut_among
from tests.helpers.excerpt_wire import Queues, join, receive, send
from tests.helpers.weight_engines import Tensors, fresh, make_rank, specs, storages

VERSION = 10


def loaded(tensors: Tensors, tp_rank: int, tp_size: int, **how: Any) -> Tensors:
    model, rank = make_rank(tp_rank, tp_size, **how)
    load_initial(rank.session.catalog, tensors.items())
    return storages(model)


def differing(model: Any, want: Tensors) -> list[str]:
    return [name for name, live in storages(model).items() if not torch.equal(live, want[name])]


@pytest.mark.parametrize("by", ["flat", "rows", "padded"])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize(("tp_size", "size"), [(1, 1), (2, 2), (4, 3)])
def test_large_parts_arrive_where_they_stay(tp_size: int, size: int, mode: str, by: str) -> None:
    made = [make_rank(rank, tp_size) for rank in range(tp_size)]
    ranks = [rank for _, rank in made]
    tensors = fresh(made[0][0])
    queues: Queues = {}
    groups = [join(rank, place, size, queues) for place, rank in enumerate(ranks)]
    send(ranks, specs(tensors), cut_among(tensors, size, by=by), queues)
    for place, (model, rank) in enumerate(made):
        rank.handle(BeginUpdate(version=VERSION, manifest=specs(tensors), mode=mode))
        receive(rank)
        rank.handle(CommitUpdate(version=VERSION))
        assert differing(model, loaded(tensors, place, tp_size)) == []
        assert groups[place].landed > 0, "nothing arrived where it stays"
    assert not any(queues.values())


def test_a_wider_dtype_on_the_wire_never_arrives_in_the_weights() -> None:
    model, rank = make_rank(dtype=torch.bfloat16)
    tensors = fresh(make_rank()[0])
    queues: Queues = {}
    join(rank, 0, 1, queues)
    send([rank], specs(tensors), cut_among(tensors, 1, by="flat"), queues)
    rank.handle(BeginUpdate(version=VERSION, manifest=specs(tensors), mode="in_place"))
    receive(rank)
    rank.handle(CommitUpdate(version=VERSION))
    assert differing(model, loaded(tensors, 0, 1, dtype=torch.bfloat16)) == []


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_what_breaks_half_way_is_put_back_unless_it_may_still_be_written(
    mode: str, ends: bool
) -> None:
    model, rank = make_rank()
    before, tensors = storages(model), fresh(model)
    queues: Queues = {}
    group = join(rank, 0, 1, queues)
    group.ends = ends
    send([rank], specs(tensors), cut_among(tensors, 1, by="flat"), queues)
    group.fails_at = 3
    rank.handle(BeginUpdate(version=VERSION, manifest=specs(tensors), mode=mode))
    with pytest.raises(GroupError, match="it broke"):
        receive(rank)
    rank.handle(AbortUpdate(version=VERSION))
    if mode == "shadow" or (mode == "undo" and ends):
        assert differing(model, before) == []
        rank.session.require_servable()
    else:
        with pytest.raises(NoVersion, match="may be a mixture"):
            rank.session.require_servable()
    # A whole update mends it, by a new group.
    group.ends = True
    queues.clear()
    join(rank, 0, 1, queues)
    send([rank], specs(tensors), cut_among(tensors, 1, by="flat"), queues)
    rank.handle(BeginUpdate(version=VERSION, manifest=specs(tensors), mode=mode))
    receive(rank)
    rank.handle(CommitUpdate(version=VERSION))
    rank.session.require_servable()
    assert differing(model, loaded(tensors, 0, 1)) == []


def test_nan_that_arrived_in_the_weights_is_put_back() -> None:
    model, rank = make_rank()
    before, tensors = storages(model), fresh(model)
    tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = float("nan")
    queues: Queues = {}
    join(rank, 0, 1, queues)
    send([rank], specs(tensors), cut_among(tensors, 1, by="flat"), queues)
    rank.handle(BeginUpdate(version=VERSION, manifest=specs(tensors), mode="undo"))
    receive(rank)
    with pytest.raises(Exception, match=r"up_proj.*NaN"):
        rank.handle(CommitUpdate(version=VERSION))
    rank.handle(AbortUpdate(version=VERSION))
    assert differing(model, before) == []
