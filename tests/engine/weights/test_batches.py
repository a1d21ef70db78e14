"""Pieces that are taken in together: their memory is free again when `feed` returns."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from msgspec.structs import replace

from engine.errors import ManifestMismatch, OutOfMemory, UpdateOrder
from engine.protocol import BeginUpdate, TensorPiece
from engine.weights import staging
from tests.helpers.weight_engines import (
    Tensors,
    assert_holds,
    contents,
    fresh,
    make_rank,
    pieces,
    specs,
    split,
)

MODES = ["shadow", "undo", "in_place"]
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def through_one_buffer(session, shares, buffer: torch.Tensor) -> None:
    """What a receiver does with broadcast after broadcast into one staging buffer."""
    for share in shares:
        buffer.fill_(torch.nan)
        arrived, at = [], 0
        for piece, flat in share:
            part = buffer[at : at + flat.numel()]
            arrived.append((piece, part.copy_(flat)))
            at += flat.numel()
        session.feed(arrived, lasting=False)
    buffer.fill_(torch.nan)


@pytest.mark.parametrize("mode", MODES)
def test_a_buffer_may_be_used_again_for_the_next_bucket(mode: str) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    whole = list(zip(pieces(new), (t.reshape(-1) for t in new.values()), strict=True))
    halves = split(dict(list(new.items())[9:]), 2)
    # The second halves complete what the first began; between them come whole tensors.
    shares = [halves[0], whole[:4], halves[1], whole[4:9]]
    session.begin(BeginUpdate(version=4, manifest=specs(new), mode=mode))
    with session.receiving(pieces(new)):
        through_one_buffer(session, shares, torch.empty(sum(t.numel() for t in new.values())))
    session.commit(4)
    assert_holds(model, new)


def test_copies_that_were_made_for_pieces_are_let_go_batch_by_batch(monkeypatch) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    monkeypatch.setattr(staging, "_BATCH_BYTES", 2000)
    made: list[weakref.ref[torch.Tensor]] = []

    def alive() -> int:
        return sum(found.nbytes for ref in made if (found := ref()) is not None)

    most: list[int] = []

    def copies() -> Iterator[staging.Arrived]:
        for piece, tensor in zip(pieces(new), new.values(), strict=True):
            most.append(alive())
            copy = tensor.reshape(-1).clone()
            made.append(weakref.ref(copy))
            arrived = (piece, copy)
            del copy
            yield arrived
            del arrived

    session.begin(BeginUpdate(version=4, mode="in_place"))
    with session.receiving(pieces(new)):
        session.feed(copies(), lasting=False)
    assert max(most) < 2000 < sum(tensor.nbytes for tensor in new.values())
    session.commit(4)
    assert_holds(model, new)


def test_nothing_more_is_written_once_the_update_is_over(monkeypatch) -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    monkeypatch.setattr(staging, "_BATCH_BYTES", 1)

    def given_up() -> Iterator[staging.Arrived]:
        for index, (piece, tensor) in enumerate(zip(pieces(new), new.values(), strict=True)):
            if index == 3:
                session.abort(4)
            yield piece, tensor.reshape(-1)

    session.begin(BeginUpdate(version=4, mode="undo"))
    with (
        pytest.raises(UpdateOrder, match="without an open update"),
        session.receiving(pieces(new)),
    ):
        session.feed(given_up(), lasting=False)
    assert_holds(model, before)
    session.require_servable()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", [(0, -1), (3, 9)])
def test_what_comes_twice_in_a_batch_is_named(mode: str, again: tuple[int, int]) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    whole = TensorPiece(NORM, "float32", [16])
    other = TensorPiece(NORM, "float32", [16], *again)
    start, stop = staging.bounds(other)
    session.begin(BeginUpdate(version=4, manifest=specs(new), mode=mode))
    with (
        pytest.raises(ManifestMismatch, match=r"model\.norm\.weight came twice"),
        session.receiving([whole]),
    ):
        session.feed([(whole, new[NORM]), (other, new[NORM][start:stop])], lasting=False)


@pytest.mark.parametrize("mode", ["undo", "in_place"])
@pytest.mark.parametrize("names", [(EMBED, HEAD), (HEAD, EMBED)])
def test_two_names_of_one_tensor_in_a_batch_are_compared(mode: str, names) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    first, second = names
    both: Tensors = {first: new[EMBED], second: new[EMBED].clone()}
    for version in (4, 5):
        session.begin(BeginUpdate(version=version, partial=True, mode=mode))
        with session.receiving(pieces(both)):
            arrived = [(piece, both[piece.name].reshape(-1)) for piece in pieces(both)]
            if version == 4:
                session.feed(arrived, lasting=False)
                session.commit(version)
                continue
            both[second] += 1
            with pytest.raises(ManifestMismatch, match=rf"{second} differs from {first}"):
                session.feed(arrived, lasting=False)
    assert torch.equal(contents(model)[EMBED], new[EMBED])


def test_what_could_not_be_kept_did_not_come(monkeypatch) -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    update = session.begin(BeginUpdate(version=4, manifest=specs(new), mode="undo"))

    def no_memory() -> None:
        raise OutOfMemory("none left", field="mode")

    with monkeypatch.context() as patch:
        patch.setattr(update.undo, "reserve", no_memory)
        with pytest.raises(OutOfMemory, match="none left"):
            session.receive(new.items())
    with pytest.raises(ManifestMismatch, match="did not come"):
        session.commit(4)
    session.receive(new.items())
    session.abort(4)
    assert_holds(model, before)


@pytest.mark.parametrize("lasting", [True, False])
def test_tensors_of_an_autograd_graph_leave_none_behind(lasting: bool) -> None:
    model, rank = make_rank()
    session = rank.session
    new = {name: (tensor * 2).requires_grad_() for name, tensor in fresh(model).items()}
    session.begin(BeginUpdate(version=4, manifest=specs(new), mode="undo"))
    session.receive(new.items(), lasting=lasting)
    session.commit(4)
    assert_holds(model, new)
    assert not any(view.requires_grad for name in new for view in session.catalog.views(name))


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_two_names_of_one_tensor_may_come_in_two_dtypes(mode: str, lasting: bool) -> None:
    """They are alike if they are served as the same bits."""
    model, rank = make_rank(dtype=torch.bfloat16)
    session, new = rank.session, fresh(model)
    for version, error in ((4, 0.0), (5, 1.0)):
        tensors = {**new, HEAD: (new[EMBED] + error).to(torch.bfloat16)}
        session.begin(BeginUpdate(version=version, manifest=specs(tensors), mode=mode))
        if version == 4:
            session.receive(tensors.items(), lasting=lasting)
            session.commit(version)
            assert_holds(model, new)
            continue
        with pytest.raises(ManifestMismatch, match="ties the two"):
            session.receive(tensors.items(), lasting=lasting)
            session.commit(version)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("announced", [True, False])
def test_pieces_of_one_tensor_come_in_one_dtype(mode: str, announced: bool) -> None:
    """Whether they come in one command or in two."""
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    first = TensorPiece(NORM, "float32", [16], 0, 9)
    second = TensorPiece(NORM, "bfloat16", [16], 9, 16)
    arrived = [(first, new[NORM][:9]), (second, new[NORM][9:].bfloat16())]
    manifest = specs({NORM: new[NORM]}) if announced else []
    for together in (True, False):
        session.begin(BeginUpdate(version=4, manifest=manifest, partial=True, mode=mode))
        if not together:
            session.expect([first])
            with session.receiving([first]):
                session.feed(arrived[:1], lasting=False)
        with pytest.raises(ManifestMismatch, match="bfloat16") as refusal:
            session.expect([first, second] if together else [second])
        assert refusal.value.field == NORM
        session.abort(4)
        if mode != "in_place":
            assert_holds(model, before)


def test_a_list_that_its_owner_writes_anew_is_read_anew() -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    manifest, plan = specs(new), pieces(new)
    session.begin(BeginUpdate(version=4, manifest=manifest))
    session.expect(plan)
    session.abort(4)
    at = next(i for i, spec in enumerate(manifest) if spec.name == NORM)
    manifest[at] = replace(manifest[at], checksum=1)
    plan[at] = replace(plan[at], shape=[15])
    update = session.begin(BeginUpdate(version=4, manifest=manifest))
    assert update.announced[NORM].checksum == 1
    with pytest.raises(ManifestMismatch, match="shape"):
        session.expect(plan)
