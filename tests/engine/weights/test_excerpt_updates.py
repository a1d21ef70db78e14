"""Every rank receives what it reads: the bits of a fresh load, or a typed error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.errors import (
    ChecksumMismatch,
    GroupError,
    ManifestMismatch,
    NonFiniteWeights,
    UpdateOrder,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    LeaveGroup,
    PlanExcerpts,
    ReceiveExcerpts,
    TensorPiece,
    TensorSpec,
)
from engine.quant.int8 import Int8
from engine.weights.checksum import checksum
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from tests.engine.weights.test_fused_names import NAMINGS, PLACES, assert_stored, make
from tests.helpers.excerpt_senders import NAME, Senders, Shards, cut_among
from tests.helpers.expert_model import drawn, expected
from tests.helpers.weight_engines import Tensors, fresh, make_rank, specs, storages

VERSION = 10
HELD = ("flat", "rows", "padded", "tensors")


@contextmanager
def senders(ranks: Sequence[WeightService], size: int, **more: Any) -> Iterator[Senders]:
    made = Senders(ranks, size, **more)
    try:
        yield made
    finally:
        made.close()


def publish(
    world: Senders, manifest: Sequence[TensorSpec], *, mode: str = "auto", version: int = VERSION
) -> None:
    for rank in world.ranks:
        rank.handle(BeginUpdate(version=version, manifest=list(manifest), mode=mode))
    world.transfer()
    for rank in world.ranks:
        rank.handle(CommitUpdate(version=version))


def loaded(tensors: Tensors, tp_rank: int, tp_size: int, **how: Any) -> Tensors:
    model, rank = make_rank(tp_rank, tp_size, **how)
    load_initial(rank.session.catalog, tensors.items())
    return storages(model)


def assert_same(model: Any, want: Tensors) -> None:
    for name, live in storages(model).items():
        assert torch.equal(live, want[name]), name


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize(("tp_size", "size"), [(1, 1), (1, 3), (2, 2), (4, 3), (4, 1)])
def test_every_rank_stores_what_a_fresh_load_would(tp_size: int, size: int, mode: str) -> None:
    made = [make_rank(rank, tp_size) for rank in range(tp_size)]
    pointers = [[p.data_ptr() for p in model.parameters()] for model, _ in made]
    with senders([rank for _, rank in made], size) as world:
        for number, by in enumerate(HELD):
            tensors = fresh(made[0][0], seed=number + 1)
            world.plan(specs(tensors), cut_among(tensors, size, by=by))
            publish(world, specs(tensors), mode=mode, version=VERSION + number)
            for place, (model, rank) in enumerate(made):
                assert_same(model, loaded(tensors, place, tp_size))
                assert rank.session.version == VERSION + number
    assert pointers == [[p.data_ptr() for p in model.parameters()] for model, _ in made]


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
@pytest.mark.parametrize("scheme", ["bfloat16", "int8"])
def test_what_is_stored_otherwise_comes_as_it_is_sent(scheme: str, mode: str) -> None:
    how: dict[str, Any] = {"linear": Int8("torch")} if scheme == "int8" else {}
    how |= {"dtype": torch.bfloat16} if scheme == "bfloat16" else {}
    made = [make_rank(rank, 2, **how) for rank in range(2)]
    tensors = fresh(make_rank()[0])
    with senders([rank for _, rank in made], 2) as world:
        world.plan(specs(tensors), cut_among(tensors, 2, by="padded"))
        publish(world, specs(tensors), mode=mode)
    for place, (model, _) in enumerate(made):
        assert_same(model, loaded(tensors, place, 2, **how))


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("place", PLACES)
def test_every_naming_of_experts_stores_the_same(place: str, naming: str, mode: str) -> None:
    model, rank = make(PLACES[place])
    with senders([rank], 2) as world:
        tensors = NAMINGS[naming](drawn(7))
        world.plan(specs(tensors), cut_among(tensors, 2, by="flat"))
        publish(world, specs(tensors), mode=mode)
    assert_stored(model, expected(PLACES[place], drawn(7)))


def test_a_plan_is_used_again_and_moves_what_is_read_and_no_more() -> None:
    made = [make_rank(rank, 2) for rank in range(2)]
    tensors = fresh(made[0][0])
    with senders([rank for _, rank in made], 2) as world:
        shards = cut_among(tensors, 2, by="flat")
        world.plan(specs(tensors), shards)
        sent = sum(
            sum(message.num_bytes for message in stage.messages)
            for stages in world._stages
            for stage in stages
        )
        padding = 16 * sum(len(own) for own in shards) * 2
        held = sum(rank.session.catalog.held_bytes(n) for _, rank in made for n in tensors)
        assert held <= sent <= held + padding
        for version in (VERSION, VERSION + 1):
            for own in tensors.values():
                own.mul_(1.5)
            publish(world, specs(tensors), version=version)
            for place, (model, _) in enumerate(made):
                assert_same(model, loaded(tensors, place, 2))


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
def test_checksums_hold_for_tensors_that_come_whole(mode: str) -> None:
    made = [make_rank(rank, 2) for rank in range(2)]
    tensors = fresh(made[0][0])
    sums = [
        TensorSpec(s.name, s.dtype, s.shape, checksum=checksum(tensors[s.name]))
        for s in specs(tensors)
    ]
    with senders([rank for _, rank in made], 2) as world:
        world.plan(sums, cut_among(tensors, 2, by="flat"))
        publish(world, sums, mode=mode)
        for place, (model, _) in enumerate(made):
            assert_same(model, loaded(tensors, place, 2))
        wrong = [*sums[:-1], TensorSpec(sums[-1].name, "float32", sums[-1].shape, checksum=5)]
        with pytest.raises(ChecksumMismatch, match=sums[-1].name):
            publish(world, wrong, mode="shadow", version=VERSION + 1)


def test_a_checksum_of_what_comes_in_part_is_refused_before_anything_moves() -> None:
    model, rank = make_rank()
    tensors = fresh(model)
    with senders([rank], 1) as world:
        world.plan(specs(tensors), cut_among(tensors, 1, by="flat"))
        rank.handle(BeginUpdate(version=VERSION, manifest=specs(tensors, checksum=7)))
        with pytest.raises(ManifestMismatch, match="whole"):
            rank.handle(ReceiveExcerpts(group=NAME))
        rank.handle(AbortUpdate(version=VERSION))


@pytest.mark.parametrize("mode", ["shadow", "undo"])
def test_a_value_that_is_not_finite_on_any_rank_leaves_the_old_version(mode: str) -> None:
    made = [make_rank(rank, 2) for rank in range(2)]
    before = [storages(model) for model, _ in made]
    tensors = fresh(made[0][0])
    tensors["model.layers.1.mlp.down_proj.weight"][3, -1] = float("nan")
    with senders([rank for _, rank in made], 2) as world:
        world.plan(specs(tensors), cut_among(tensors, 2, by="flat"))
        manifest = specs(tensors)
        for _, rank in made:
            rank.handle(BeginUpdate(version=VERSION, manifest=manifest, mode=mode))
        world.transfer()
        # The last column is the second rank's; ranks of one engine would agree.
        with pytest.raises(NonFiniteWeights, match="down_proj"):
            made[1][1].handle(CommitUpdate(version=VERSION))
        for _, rank in made:
            rank.handle(AbortUpdate(version=VERSION))
    for (model, _), want in zip(made, before, strict=True):
        assert_same(model, want)


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_may_come_under_both_names_if_they_are_equal(differ: bool, mode: str) -> None:
    made = [make_rank(rank, 2) for rank in range(2)]
    tensors = fresh(made[0][0])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if differ:
        tensors["lm_head.weight"][0, 0] += 1
    with senders([rank for _, rank in made], 2) as world:
        world.plan(specs(tensors), cut_among(tensors, 2, by="flat"))
        if differ:
            with pytest.raises(ManifestMismatch, match="ties the two"):
                publish(world, specs(tensors), mode=mode)
            return
        publish(world, specs(tensors), mode=mode)
    for place, (model, _) in enumerate(made):
        assert_same(model, loaded(fresh(made[0][0]), place, 2))


def planned(shards: Shards, **changes: Any) -> PlanExcerpts:
    tensors: dict[str, TensorPiece] = {}
    for piece, _ in shards:
        tensors.setdefault(piece.name, TensorPiece(piece.name, piece.dtype, piece.shape))
    numbers = {name: number for number, name in enumerate(tensors)}
    shares = [[(numbers[p.name], p.start, p.stop) for p, _ in shards]]
    fields = {"group": NAME, "tensors": list(tensors.values()), "shares": shares}
    return PlanExcerpts(**(fields | changes))


def test_a_plan_that_is_not_of_this_model_or_group_is_refused_by_name() -> None:
    model, rank = make_rank()
    (shards,) = cut_among(fresh(model), 1, by="flat")
    good = planned(shards)
    with senders([rank], 1) as world:
        first, second = good.tensors[:2]
        size = good.shares[0][0][2]
        refused: list[tuple[dict[str, Any], type, str]] = [
            ({"group": "other"}, GroupError, "no group 'other'"),
            ({"shares": [*good.shares, []]}, GroupError, "1 sending ranks"),
            ({"shares": [good.shares[0][1:]]}, ManifestMismatch, f"of {first.name}"),
            ({"shares": [[(0, 0, size), *good.shares[0]]]}, ManifestMismatch, "came twice"),
            ({"shares": [[(0, 0, size + 1)]]}, ManifestMismatch, "has no elements"),
            ({"shares": [[(999, 0, 1)]]}, ManifestMismatch, "tensor 999"),
            ({"tensors": [first, first]}, ManifestMismatch, "announced twice"),
            ({"tensors": [TensorPiece("no", "float32", [1])]}, ManifestMismatch, "no is no tensor"),
            (
                {"tensors": [TensorPiece(first.name, "int64", first.shape)]},
                ManifestMismatch,
                "not a float",
            ),
            (
                {"tensors": [TensorPiece(second.name, "float32", [3, 3, 3])]},
                ManifestMismatch,
                "has shape",
            ),
        ]
        for changes, kind, words in refused:
            with pytest.raises(kind, match=words):
                rank.handle(planned(shards, **changes))
        with pytest.raises(UpdateOrder, match="without an open update"):
            rank.handle(ReceiveExcerpts(group=NAME))
        rank.handle(BeginUpdate(version=VERSION))
        with pytest.raises(GroupError, match="nothing is planned"):
            rank.handle(ReceiveExcerpts(group=NAME))
        world.plan(specs(fresh(model)), [shards])
        rank.handle(LeaveGroup(name=NAME))
        rank.handle(BeginUpdate(version=VERSION))
        with pytest.raises(GroupError, match="no group"):
            rank.handle(ReceiveExcerpts(group=NAME))


def test_a_source_that_yields_what_was_not_planned_says_so_and_the_old_version_stays() -> None:
    model, rank = make_rank()
    before = storages(model)
    (shards,) = cut_among(fresh(model), 1, by="flat")
    for change in ("less", "more", "other"):
        with senders([rank], 1) as world:
            world.plan(specs(fresh(model)), [shards])
            rank.handle(BeginUpdate(version=VERSION, manifest=specs(fresh(model)), mode="shadow"))
            other = [shards[1], *shards[1:]]
            held = {"less": shards[:-1], "more": [*shards, shards[0]], "other": other}[change]
            with pytest.raises(ManifestMismatch, match="planned"):
                world.transfer([held])
            rank.handle(AbortUpdate(version=VERSION))
    assert_same(model, before)
    rank.session.require_servable()
