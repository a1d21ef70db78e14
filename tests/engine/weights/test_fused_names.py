"""One layer of experts under a name each, under fused names, and some of both: the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.errors import ChecksumMismatch, ManifestMismatch, NonFiniteWeights
from engine.parallel.mesh import Mesh
from engine.protocol import BeginUpdate, CheckWeights, GetWeight, TensorPiece, TensorSpec
from engine.weights.checksum import checksum
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from tests.helpers.expert_model import (
    DOWN,
    GATE_UP,
    HIDDEN,
    INNER,
    ExpertModel,
    Place,
    Tensors,
    cut,
    drawn,
    each,
    expected,
    mixed,
)

PLACES = {
    "whole": Place(),
    "expert parallel": Place(slots=(2, 1)),
    "replicated": Place(slots=(3, 0, 3)),
    "sliced": Place(rows=slice(4, 8)),
    "in turns": Place(slots=(1, 3), rows=slice(2, 6), turns=True),
}
NAMINGS: dict[str, Callable[[Tensors], Tensors]] = {"fused": dict, "each": each, "mixed": mixed}
UNIT = "mlp.experts.2.up_proj.weight"


def make(place: Place) -> tuple[ExpertModel, WeightService]:
    """A rank that serves version 3 of the weights of seed 0."""
    model = ExpertModel(place)
    service = WeightService(
        model,
        version=3,
        device=torch.device("cpu"),
        mesh=Mesh(),
        agree=lambda value: value,
        require_weights=lambda: None,
    )
    load_initial(service.session.catalog, each(drawn(0)).items())
    return model, service


def specs(tensors: Tensors, *, sums: bool = False) -> list[TensorSpec]:
    return [
        TensorSpec(name, "float32", list(t.shape), checksum=checksum(t) if sums else None)
        for name, t in tensors.items()
    ]


def send(service: WeightService, tensors: Tensors, how: str) -> None:
    session = service.session
    if how != "pieces":
        session.receive(tensors.items(), lasting=how == "lent")
        return
    arrived = [
        (TensorPiece(name, "float32", list(tensors[name].shape), start, stop), start, stop)
        for name, start, stop in cut(tensors, seed=5)
    ]
    session.expect([piece for piece, _, _ in arrived])
    with session.receiving([piece for piece, _, _ in arrived]):
        flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
        session.feed(((p, flat[p.name][a:b]) for p, a, b in arrived), lasting=False)


def assert_stored(model: ExpertModel, want: Tensors) -> None:
    for name, storage in model.storages().items():
        assert torch.equal(storage, want[name]), name


@pytest.mark.parametrize("how", ["lent", "read", "pieces"])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("place", PLACES)
def test_every_naming_stores_the_same(place: str, naming: str, mode: str, how: str) -> None:
    model, service = make(PLACES[place])
    pointers = [p.data_ptr() for p in model.parameters()]
    assert_stored(model, expected(PLACES[place], drawn(0)))
    new = NAMINGS[naming](drawn(1))
    service.session.begin(BeginUpdate(version=4, manifest=specs(new, sums=True), mode=mode))
    send(service, new, how)
    report = service.session.commit(4)
    assert report.num_tensors == 13
    assert_stored(model, expected(PLACES[place], drawn(1)))
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("how", ["read", "pieces"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_an_undo_copy_brings_every_replica_back(naming: str, how: str) -> None:
    place = PLACES["replicated"]
    model, service = make(place)
    new = NAMINGS[naming](drawn(1))
    service.session.begin(BeginUpdate(version=4, manifest=specs(new), mode="undo"))
    send(service, new, how)
    assert not torch.equal(model.storages()["norm.weight"], drawn(0)["norm.weight"])
    service.session.abort(4)
    assert_stored(model, expected(place, drawn(0)))
    service.session.require_servable()


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
@pytest.mark.parametrize("announced", [True, False])
def test_a_unit_that_comes_under_two_names_is_named(mode: str, announced: bool) -> None:
    _, service = make(Place())
    new = {**drawn(1), UNIT: each(drawn(1))[UNIT]}
    with pytest.raises(ManifestMismatch, match="twice") as refusal:
        manifest = specs(new) if announced else []
        service.session.begin(BeginUpdate(version=4, manifest=manifest, mode=mode))
        send(service, new, "read")
    assert refusal.value.field == UNIT


def test_pieces_of_a_unit_under_two_names_are_refused_before_any_is_taken() -> None:
    model, service = make(Place())
    service.session.begin(BeginUpdate(version=4, mode="in_place"))
    pieces = [
        TensorPiece(UNIT, "float32", [INNER, HIDDEN], 0, 5),
        TensorPiece(GATE_UP, "float32", [4, 2 * INNER, HIDDEN]),
    ]
    with pytest.raises(ManifestMismatch, match="came twice") as refusal:
        service.session.expect(pieces)
    assert refusal.value.field == UNIT
    assert_stored(model, expected(Place(), drawn(0)))


def test_what_is_missing_of_a_fused_tensor_is_named() -> None:
    _, service = make(Place())
    new = drawn(1)
    service.session.begin(BeginUpdate(version=4, manifest=specs(new)))
    flat = new[GATE_UP].reshape(-1)
    size = INNER * HIDDEN
    pieces = [
        TensorPiece(GATE_UP, "float32", [4, 2 * INNER, HIDDEN], 0, 5 * size),
        TensorPiece(GATE_UP, "float32", [4, 2 * INNER, HIDDEN], 6 * size, 8 * size),
    ]
    others = {name: tensor for name, tensor in new.items() if name != GATE_UP}
    send(service, others, "read")
    with service.session.receiving(pieces):
        session = service.session
        session.feed(((p, flat[p.start : p.stop]) for p in pieces), lasting=False)
    with pytest.raises(ManifestMismatch, match="did not come") as refusal:
        service.session.commit(4)
    assert refusal.value.field == UNIT


@pytest.mark.parametrize("piece", [(-1, 5), (0, 10_000), (400, 300)])
def test_a_range_that_a_fused_tensor_does_not_have_is_refused(piece: tuple[int, int]) -> None:
    _, service = make(Place())
    service.session.begin(BeginUpdate(version=4))
    with pytest.raises(ManifestMismatch, match="has no elements") as refusal:
        service.session.expect([TensorPiece(DOWN, "float32", [4, HIDDEN, INNER], *piece)])
    assert refusal.value.field == DOWN


def test_a_wrong_shape_or_sum_of_a_fused_tensor_names_it() -> None:
    model, service = make(Place())
    with pytest.raises(ManifestMismatch) as refusal:
        bad = TensorSpec(DOWN, "float32", [4, INNER, HIDDEN])
        service.session.begin(BeginUpdate(version=4, manifest=[bad], partial=True))
    assert refusal.value.field == DOWN
    new = drawn(1)
    manifest = specs(new, sums=True)
    new[GATE_UP][3, 0, 0] += 1
    service.session.begin(BeginUpdate(version=4, manifest=manifest, mode="undo"))
    send(service, new, "pieces")
    with pytest.raises(ChecksumMismatch) as mismatch:
        service.session.commit(4)
    assert mismatch.value.field == GATE_UP
    service.session.abort(4)
    assert_stored(model, expected(Place(), drawn(0)))


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
def test_a_nan_in_a_fused_tensor_names_the_unit(mode: str) -> None:
    _, service = make(Place())
    new = drawn(1)
    new[GATE_UP][2, INNER + 1, 0] = float("nan")
    service.session.begin(BeginUpdate(version=4, mode=mode))
    send(service, new, "read")
    with pytest.raises(NonFiniteWeights) as refusal:
        service.session.commit(4)
    assert refusal.value.field == UNIT


def test_an_expert_of_another_rank_is_no_bytes_here() -> None:
    _, service = make(PLACES["expert parallel"])
    catalog = service.session.catalog
    assert catalog.held_bytes("mlp.experts.0.up_proj.weight") == 0
    assert catalog.held_bytes(UNIT) == 4 * INNER * HIDDEN
    (held,) = service.handle(GetWeight(name=UNIT, count=7)).weights
    assert held.values == each(drawn(0))[UNIT].reshape(-1)[:7].tolist()
    (absent,) = service.handle(GetWeight(name="mlp.experts.0.up_proj.weight")).weights
    assert absent.values == []


def test_sums_are_of_what_is_stored_in_every_naming() -> None:
    sums = []
    for naming in NAMINGS.values():
        _, service = make(PLACES["in turns"])
        new = naming(drawn(1))
        service.session.begin(BeginUpdate(version=4))
        send(service, new, "read")
        service.session.commit(4)
        (report,) = service.handle(CheckWeights()).weights
        sums.append(report.checksums)
    assert sums[0] == sums[1] == sums[2]
    assert len(sums[0]) == 13
    assert sums[0]["norm.weight"] == checksum(drawn(1)["norm.weight"])
