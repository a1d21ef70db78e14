"""Updates of whole models with experts: by every carrier, name and order the bits of a fresh load,
on each of several ranks; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ChecksumMismatch, ManifestMismatch, NonFiniteWeights
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    GetWeight,
    ReceiveBroadcast,
    TensorSpec,
)
from engine.weights.checksum import checksum
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from tests.helpers import update_carriers
from tests.helpers.excerpt_senders import Senders, cut_among
from tests.helpers.expert_weights import BIAS, FORMS, MODELS, drawn, in_memory, mixed, shuffled
from tests.helpers.weight_engines import Tensors, join, make_rank, send, specs, split, storages
from trainer_bridge.stored import stored_checksums

PLACES = [(0, 1, False), (1, 2, False), (0, 2, True), (1, 2, True), (2, 4, False)]
IDS = ["whole", "slices of 2", "experts of 2, first", "experts of 2", "slices of 4"]
UP = "model.layers.0.mlp.experts.3.up_proj.weight"
DOWN = "model.layers.0.mlp.experts.down_proj"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def make(
    name: str, place: tuple[int, int, bool] = (0, 1, False), **options: Any
) -> tuple[Any, Any]:
    """(model, weight service) of one rank of a family."""
    rank, size, ep = place
    return make_rank(rank, size, ep=ep, config=MODELS[name], num_layers=2, **options)


def fresh(name: str, place: tuple[int, int, bool], new: Tensors, **options: Any) -> Tensors:
    """What a rank stores that loads these tensors when it starts."""
    model, rank = make(name, place, **options)
    load_initial(rank.session.catalog, new.items())
    rank.close()
    return storages(model)


def assert_stores(model: Any, wanted: Tensors) -> None:
    found = storages(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@contextmanager
def carried(name: str, rank: WeightService, folder: Path) -> Iterator[update_carriers.Carrier]:
    carrier = update_carriers.make(name, rank, folder)
    yield carrier
    carrier.recover()
    rank.close()
    close = getattr(carrier, "close", None)
    if close is not None:
        close()


def cases() -> list[Any]:
    """Every carrier to every place, the families in turn. One that meets a group comes to an engine
    of one rank; see below for those of several."""
    found = []
    for row, carrier in enumerate(update_carriers.NAMES):
        meets = carrier in ("group", "excerpts", "summed")
        for column, place in enumerate(PLACES[:1] if meets else PLACES):
            family = list(MODELS)[(row + column) % len(MODELS)]
            found.append(
                pytest.param(carrier, place, family, id=f"{carrier}, {IDS[column]}, {family}")
            )
    return found


@pytest.mark.parametrize(("carrier", "place", "family"), cases())
def test_every_carrier_stores_what_a_fresh_load_does(
    carrier: str, place: tuple[int, int, bool], family: str, tmp_path: Path
) -> None:
    model, rank = make(family, place)
    version = rank.session.version
    with carried(carrier, rank, tmp_path) as way:
        for mode, (form, name_as) in zip(
            ("undo", "shadow", "in_place"), FORMS.items(), strict=True
        ):
            version += 1
            new = drawn(model, seed=version)
            sent = shuffled(name_as(model, new), seed=version)
            way.prepare(sent)
            sums = {} if carrier == "excerpts" else {n: checksum(t) for n, t in sent.items()}
            manifest = [
                TensorSpec(s.name, s.dtype, s.shape, checksum=sums.get(s.name)) for s in specs(sent)
            ]
            rank.handle(BeginUpdate(version=version, manifest=manifest, mode=mode))
            way.receive()
            rank.handle(CommitUpdate(version=version))
            assert_stores(model, fresh(family, place, new))
            (layout,) = rank.handle(CheckWeights(action="layout")).weights
            (held,) = rank.handle(CheckWeights()).weights
            assert stored_checksums(sent.items(), layout.layout) == held.checksums, form


def assert_fresh(
    ranks: list[tuple[Any, WeightService]], family: str, ep: bool, new: Tensors
) -> None:
    for place, (model, _) in enumerate(ranks):
        assert_stores(model, fresh(family, (place, len(ranks), ep), new))


@pytest.mark.parametrize(("family", "ep"), [("qwen2", True), ("mixtral", False), ("glm4", True)])
def test_excerpts_reach_every_rank(family: str, ep: bool) -> None:
    """As ranks of ZeRO, FSDP2 and of neither hold their parts."""
    ranks = [make(family, (place, 2, ep)) for place in range(2)]
    world = Senders([rank for _, rank in ranks], 3)
    ways = zip(
        FORMS.items(), ("padded", "rows", "flat"), ("shadow", "undo", "in_place"), strict=True
    )
    try:
        for version, ((_, name_as), by, mode) in enumerate(ways, 4):
            new = drawn(ranks[0][0], seed=version)
            sent = shuffled(name_as(ranks[0][0], new), seed=version)
            world.plan(specs(sent), cut_among(sent, 3, by=by))
            for _, rank in ranks:
                rank.handle(BeginUpdate(version=version, manifest=specs(sent), mode=mode))
            world.transfer()
            for _, rank in ranks:
                rank.handle(CommitUpdate(version=version))
            assert_fresh(ranks, family, ep, new)
    finally:
        world.close()


@pytest.mark.parametrize(("family", "ep"), [("qwen2", False), ("mixtral", True), ("glm4", False)])
def test_broadcast_pieces_reach_every_rank(family: str, ep: bool) -> None:
    ranks = [make(family, (place, 2, ep)) for place in range(2)]
    sender = join([rank for _, rank in ranks])
    try:
        for version, name_as in enumerate(FORMS.values(), 4):
            new = drawn(ranks[0][0], seed=version)
            sent = shuffled(name_as(ranks[0][0], new), seed=version)
            cuts = [cut for share in split(sent, 3) for cut in share if cut[1].numel()]
            receive = ReceiveBroadcast(
                group="g", tensors=[piece for piece, _ in cuts], layout="tensors", timeout_s=20
            )
            for _, rank in ranks:
                rank.handle(BeginUpdate(version=version, manifest=specs(sent)))
            with ThreadPoolExecutor(3) as pool:
                running = [pool.submit(rank.handle, receive) for _, rank in ranks]
                running.append(pool.submit(send, sender, [values for _, values in cuts]))
                for each in running:
                    each.result(120)
            for _, rank in ranks:
                rank.handle(CommitUpdate(version=version))
            assert_fresh(ranks, family, ep, new)
    finally:
        sender.close()
        for _, rank in ranks:
            rank.close()


@pytest.mark.parametrize("place", PLACES[1:3], ids=IDS[1:3])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_a_bias_of_choice_keeps_its_bits_in_a_model_of_16(
    wire: torch.dtype, place: tuple[int, int, bool]
) -> None:
    model, rank = make("glm4", place, dtype=torch.bfloat16)
    new = drawn(model, 4, wire)
    sent = in_memory(model, new)
    rank.handle(BeginUpdate(version=4, manifest=specs(sent)))
    rank.session.receive(sent.items())
    rank.handle(CommitUpdate(version=4))
    assert_stores(model, fresh("glm4", place, new, dtype=torch.bfloat16))
    (name,) = (name for name in new if name.endswith(BIAS))
    assert new[name].dtype == torch.float32
    (report,) = rank.handle(GetWeight(name=name, count=4)).weights
    assert report.values == new[name].tolist()


@pytest.mark.parametrize("mode", ["shadow", "undo"])
def test_an_update_that_is_dropped_leaves_what_was(mode: str) -> None:
    for place in PLACES:
        model, rank = make("mixtral", place)
        before = storages(model)
        rank.handle(BeginUpdate(version=4, mode=mode))
        rank.session.receive(in_memory(model, drawn(model, 4)).items())
        rank.handle(AbortUpdate(version=4))
        assert_stores(model, before)


def test_values_are_read_by_the_rank_that_holds_them() -> None:
    for place, holds in (((0, 2, True), False), ((1, 2, True), True)):
        model, rank = make("qwen2", place)
        new = drawn(model, 4)
        rank.handle(BeginUpdate(version=4))
        rank.session.receive(new.items())
        rank.handle(CommitUpdate(version=4))
        (report,) = rank.handle(GetWeight(name=UP, count=3)).weights
        assert report.values == (new[UP].flatten()[:3].tolist() if holds else [])


def refused(
    tensors: Tensors, *, family: str = "qwen2", announced: bool = False, partial: bool = False
) -> ManifestMismatch:
    """The error of an update of these tensors, after which the engine holds what it did."""
    model, rank = make(family)
    before = storages(model)
    with pytest.raises(ManifestMismatch) as caught:
        manifest = specs(tensors) if announced else []
        rank.handle(BeginUpdate(version=4, manifest=manifest, mode="shadow", partial=partial))
        rank.session.receive(tensors.items())
        rank.handle(CommitUpdate(version=4))
    assert_stores(model, before)
    return caught.value


@pytest.mark.parametrize("announced", [False, True])
def test_an_expert_without_its_up_projection_is_named(announced: bool) -> None:
    new = drawn(make("qwen2")[0], 4)
    del new[UP]
    error = refused(new, announced=announced)
    assert error.field == UP


@pytest.mark.parametrize("announced", [False, True])
def test_experts_together_and_one_of_them_again_are_refused(announced: bool) -> None:
    model = make("qwen2")[0]
    both = {**in_memory(model, drawn(model, 4)), UP: drawn(model, 5)[UP]}
    error = refused(both, announced=announced)
    assert error.field == UP
    assert "twice" in error.message
    assert GATE_UP in error.message or not announced


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [(UP, (12, 15)), (DOWN, (3, 16, 12)), (GATE_UP, (4, 16, 24)), (GATE_UP, (4, 24, 15))],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], announced: bool) -> None:
    model = make("qwen2")[0]
    new = drawn(model, 4) if name == UP else in_memory(model, drawn(model, 4))
    error = refused({**new, name: torch.zeros(shape)}, announced=announced)
    assert error.field == name
    assert str(list(shape)) in error.message


def test_an_expert_too_many_is_no_tensor_of_the_model() -> None:
    other = UP.replace("experts.3", "experts.4")
    model = make("qwen2")[0]
    assert refused({**drawn(model, 4), other: torch.zeros(12, 16)}).field == other


def test_a_router_under_both_names_has_to_be_one() -> None:
    model = make("mixtral")[0]
    new = drawn(model, 4)
    second, name = next(iter(model.aliases().items()))
    assert (second, name) == (
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    )
    error = refused({**new, second: new[name] + 1}, family="mixtral")
    assert error.field in (name, second)


def test_a_wrong_sum_of_experts_together_names_them() -> None:
    model, rank = make("glm4")
    sent = in_memory(model, drawn(model, 4))
    manifest = [
        TensorSpec(name, "float32", list(tensor.shape), checksum=checksum(tensor))
        for name, tensor in sent.items()
    ]
    name = next(name for name in sent if name.endswith("down_proj") and "experts" in name)
    sent[name][2, 3, 1] += 1
    rank.handle(BeginUpdate(version=4, manifest=manifest))
    rank.session.receive(sent.items())
    with pytest.raises(ChecksumMismatch) as caught:
        rank.handle(CommitUpdate(version=4))
    assert caught.value.field == name


@pytest.mark.parametrize("name_as", [in_memory, mixed])
def test_a_nan_names_the_expert(name_as: Any) -> None:
    model, rank = make("qwen2")
    new = drawn(model, 4)
    name = UP.replace("up_proj", "down_proj")
    new[name][0, 0] = float("nan")
    rank.handle(BeginUpdate(version=4))
    rank.session.receive(name_as(model, new).items())
    with pytest.raises(NonFiniteWeights) as caught:
        rank.handle(CommitUpdate(version=4))
    assert caught.value.field == name
