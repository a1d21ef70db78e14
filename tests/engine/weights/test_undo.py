"""Whatever touches a live weight is undone, or the engine goes on refusing until all is whole."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ManifestMismatch, OutOfMemory, WeightUpdateError
from engine.protocol import BeginUpdate
from engine.weights.undo import UndoCopy
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank, pieces, specs

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def dies_half_way(monkeypatch, session) -> None:
    real = session.catalog.place

    def place(tensors, *rest):
        real(dict(list(tensors.items())[: len(tensors) // 2]), *rest)
        raise RuntimeError("half-way")

    monkeypatch.setattr(session.catalog, "place", place)


@pytest.mark.parametrize("lasting", [True, False])
def test_a_commit_that_dies_half_way_is_undone_at_once(monkeypatch, lasting: bool) -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    session.begin(BeginUpdate(version=4, manifest=specs(new), mode="undo"))
    if not lasting:
        dies_half_way(monkeypatch, session)
    with pytest.raises(RuntimeError, match="half-way"):
        session.receive(new.items(), lasting=lasting)
        dies_half_way(monkeypatch, session)
        session.commit(4)
    assert_holds(model, before)
    session.require_servable()
    assert (session.version, session.open_version) == (3, None)


def test_a_shadow_that_dies_half_way_needs_more_than_a_part(monkeypatch) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    session.begin(BeginUpdate(version=4, mode="shadow"))
    session.receive(new.items())
    with monkeypatch.context() as patch:
        dies_half_way(patch, session)
        with pytest.raises(RuntimeError, match="half-way"):
            session.commit(4)
    session.abort(4)
    with pytest.raises(WeightUpdateError, match="mixture"):
        session.require_servable()
    session.begin(BeginUpdate(version=5, partial=True))
    session.receive([(NORM, new[NORM])])
    with pytest.raises(ManifestMismatch, match="half-written"):
        session.commit(5)
    session.abort(5)
    with pytest.raises(WeightUpdateError, match="mixture"):
        session.require_servable()
    session.begin(BeginUpdate(version=6))
    session.receive(new.items())
    session.commit(6)
    session.require_servable()
    assert_holds(model, new)


def test_an_undo_that_fails_goes_on_refusing(monkeypatch) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    update = session.begin(BeginUpdate(version=4, mode="undo"))
    session.receive(new.items())

    def dies(_catalog):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(update.undo, "put_back", dies)
    with pytest.raises(RuntimeError, match="device is lost"):
        session.abort(4)
    with pytest.raises(WeightUpdateError, match="mixture"):
        session.require_servable()
    session.begin(BeginUpdate(version=5, mode="undo"))
    session.receive(new.items())
    session.commit(5)
    session.require_servable()
    assert_holds(model, new)


@pytest.mark.parametrize("first", [EMBED, HEAD])
def test_a_tied_twin_that_is_lent_is_compared_with_the_one_that_was_written(first: str) -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    second = HEAD if first == EMBED else EMBED
    written = {first if name == EMBED else name: tensor for name, tensor in new.items()}
    session.begin(BeginUpdate(version=4, mode="undo"))
    plan = pieces(written)
    with session.receiving(plan):
        arrived = [(piece, written[piece.name].reshape(-1)) for piece in plan]
        session.feed(arrived, lasting=False)
    session.receive([(second, new[EMBED] + 1)], lasting=True)
    with pytest.raises(ManifestMismatch, match="ties the two"):
        session.commit(4)
    session.abort(4)
    assert_holds(model, before)
    session.require_servable()


def test_released_weights_take_no_undo_copy_back() -> None:
    """What is gone is gone: an update that was open then cannot lift the refusal."""
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    session.begin(BeginUpdate(version=4, mode="undo"))
    session.receive(new.items())
    session.invalidate("the weights were released without a backup")
    session.abort(4)
    with pytest.raises(WeightUpdateError, match="without a backup"):
        session.require_servable()
    assert torch.equal(contents(model)[NORM], new[NORM])


def test_an_undo_copy_that_the_host_cannot_hold_is_refused_with_its_size() -> None:
    with pytest.raises(OutOfMemory, match=r"GiB for an undo copy.*begin with mode") as refusal:
        UndoCopy(1 << 60, 1, torch.device("cpu")).reserve()
    assert refusal.value.field == "mode"


def test_tensors_that_the_host_cannot_hold_end_the_update_with_a_reason() -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    session.begin(BeginUpdate(version=4, manifest=specs(new), mode="undo"))

    def more_than_there_is():
        yield NORM, new[NORM]
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(OutOfMemory, match="no memory for the tensors of version 4"):
        session.receive(more_than_there_is())
    assert_holds(model, before)
    session.require_servable()
