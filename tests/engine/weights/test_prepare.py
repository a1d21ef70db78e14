"""The first of two phases: everything is verified, nothing is placed, and time starts anew."""

from __future__ import annotations

import time

import pytest

from engine.errors import ChecksumMismatch, ManifestMismatch, NonFiniteWeights, UpdateOrder
from engine.protocol import BeginUpdate
from engine.weights import verify
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank, specs

NORM = "model.norm.weight"
MODES = ["shadow", "undo", "in_place"]


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_commit_verifies_nothing_twice(monkeypatch, mode: str, lasting: bool) -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    session.begin(BeginUpdate(version=4, manifest=specs(new), mode=mode))
    session.receive(new.items(), lasting=lasting)
    session.prepare(4)
    if mode == "shadow" or lasting:
        assert_holds(model, before)
    assert session.version == 3

    def again(*_args):
        raise AssertionError("verified twice")

    if not lasting:
        monkeypatch.setattr(verify, "require_bits", again)
    monkeypatch.setattr(verify, "require_complete", again)
    session.prepare(4)
    report = session.commit(4)
    assert_holds(model, new)
    assert session.commit(4) is report
    session.prepare(4)


def test_what_was_lent_is_looked_at_again_by_the_commit() -> None:
    model, rank = make_rank()
    session, before, new = rank.session, contents(model), fresh(model)
    session.begin(BeginUpdate(version=4))
    session.receive(new.items(), lasting=True)
    session.prepare(4)
    new[NORM][3] = float("nan")
    with pytest.raises(NonFiniteWeights) as refused:
        session.commit(4)
    assert refused.value.field == NORM
    assert_holds(model, before)
    session.require_servable()
    new[NORM][3] = 1.0
    session.commit(4)
    assert_holds(model, new)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_commit_would_refuse(mode: str) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    with pytest.raises(UpdateOrder, match="without an open update"):
        session.prepare(4)
    manifest = [type(s)(s.name, s.dtype, s.shape, 5) for s in specs(new)]
    session.begin(BeginUpdate(version=4, manifest=manifest, mode=mode))
    session.receive(list(new.items())[1:])
    with pytest.raises(ManifestMismatch, match="did not come"):
        session.prepare(4)
    with pytest.raises(UpdateOrder, match="to version 4, not 5"):
        session.prepare(5)
    session.receive(list(new.items())[:1])
    with pytest.raises(ChecksumMismatch):
        session.prepare(4)


def test_what_comes_afterwards_is_verified_again() -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    session.begin(BeginUpdate(version=4, partial=True))
    session.receive([(name, t) for name, t in new.items() if name != NORM])
    session.prepare(4)
    session.receive([(NORM, new[NORM] * float("nan"))])
    with pytest.raises(Exception, match=r"norm.*NaN"):
        session.commit(4)


def test_the_time_of_the_update_starts_anew(monkeypatch) -> None:
    model, rank = make_rank()
    session, new = rank.session, fresh(model)
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    session.begin(BeginUpdate(version=4, timeout_s=60.0))
    session.receive(new.items())
    clock[0] += 50.0
    session.prepare(4)
    clock[0] += 50.0
    session.commit(4)
    assert session.version == 4
