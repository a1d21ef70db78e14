"""Shadow, undo and in place: which is chosen, deadlines, checksums, and ranks that disagree."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.errors import (
    ChecksumMismatch,
    ManifestMismatch,
    MemoryReleased,
    OutOfMemory,
    UpdateOrder,
    UpdateTimeout,
    WeightUpdateError,
)
from engine.protocol import BeginUpdate, TensorPiece
from engine.weights.checksum import checksum
from engine.weights.session import UpdateSession
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank, pieces, specs

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


def make(**options):
    model, rank = make_rank()
    return model, UpdateSession(model, version=rank.session.version, **options)


def feed(session: UpdateSession, tensors: dict[str, torch.Tensor]) -> None:
    """What a transport does with whole tensors in memory it will use again."""
    plan = pieces(tensors)
    session.expect(plan)
    with session.receiving(plan):
        memory = {name: tensor.reshape(-1).clone() for name, tensor in tensors.items()}
        session.feed([(piece, memory[piece.name]) for piece in plan], lasting=False)
        for flat in memory.values():
            flat.zero_()


def full_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("announce", [True, False])
@pytest.mark.parametrize("room,in_place", [(1, False), (-1, True)])
def test_auto_takes_a_shadow_where_one_fits(announce: bool, room: int, in_place: bool) -> None:
    new = fresh(make_rank()[0])
    free = full_bytes(new) + (16 << 20) + (room if room < 0 else 0)
    model, session = make(free=lambda _device: free)
    before = contents(model)
    session.begin(BeginUpdate(version=4, manifest=specs(new) if announce else []))
    first = dict(list(new.items())[:3])
    feed(session, first)
    assert bool(session.refusal) == in_place
    if in_place:
        assert_holds(model, {**before, **first})
    else:
        assert_holds(model, before)
    feed(session, dict(list(new.items())[3:]))
    report = session.commit(4)
    assert_holds(model, new)
    session.require_servable()
    assert (report.num_tensors, report.num_bytes) == (len(new), full_bytes(new))


def test_a_shadow_that_was_asked_for_and_does_not_fit_is_refused_with_numbers() -> None:
    _, session = make(free=lambda _device: 1 << 20)
    with pytest.raises(OutOfMemory, match=r"shadow of .* GiB does not fit: .* GiB"):
        session.begin(BeginUpdate(version=4, mode="shadow"))
    assert session.open_version is None
    session.begin(BeginUpdate(version=4, mode="in_place"))


def test_an_aborted_in_place_update_refuses_until_a_covering_one_is_committed() -> None:
    model, session = make()
    new = fresh(model)
    session.begin(BeginUpdate(version=4, mode="in_place", partial=True))
    feed(session, {NORM: new[NORM]})
    with pytest.raises(WeightUpdateError, match=r"version 4 is written in place.*model.norm"):
        session.require_servable()
    session.abort(4)
    session.begin(BeginUpdate(version=5, partial=True))
    feed(session, {EMBED: new[EMBED]})
    with pytest.raises(ManifestMismatch, match=r"model.norm.weight half-written.* version 4"):
        session.commit(5)
    with pytest.raises(WeightUpdateError):
        session.require_servable()
    feed(session, {NORM: new[NORM]})
    session.commit(5)
    session.require_servable()


def test_an_undo_copy_is_of_this_rank_s_part_only() -> None:
    pair = Pair(free=[lambda _d: 14_000 + (16 << 20)] * 2)
    new = fresh(make_rank()[0])
    half = [sum(t.nbytes for t in contents(model).values()) for model in pair.models]
    assert max(half) < 14_000 < full_bytes(new), "the room must hold a part and not the whole"
    before = [contents(model) for model in pair.models]
    assert pair.both(lambda s: s.begin(BeginUpdate(version=4))) == [None, None]
    assert pair.both(lambda s: feed(s, dict(list(new.items())[:3]))) == [None, None]
    assert all(session.refusal for session in pair.sessions), "written at once"
    assert pair.both(lambda s: s.abort(4)) == [None, None]
    for model, session, old in zip(pair.models, pair.sessions, before, strict=True):
        held = contents(model)
        assert all(torch.equal(held[name], old[name]) for name in old)
        session.require_servable()


def test_no_rank_writes_what_another_has_no_undo_copy_for(monkeypatch) -> None:
    pair = Pair()
    new = fresh(pair.models[0])
    before = [contents(model) for model in pair.models]
    assert pair.both(lambda s: s.begin(BeginUpdate(version=4, mode="undo"))) == [None, None]

    def no_memory() -> None:
        raise OutOfMemory("none left", field="mode")

    monkeypatch.setattr(pair.sessions[1]._open.undo, "reserve", no_memory)
    first, second = pair.both(lambda s: feed(s, new))
    assert isinstance(first, WeightUpdateError) and isinstance(second, OutOfMemory)
    for model, session, old in zip(pair.models, pair.sessions, before, strict=True):
        held = contents(model)
        assert all(torch.equal(held[name], old[name]) for name in old)
        session.require_servable()


def test_lent_tensors_take_an_undo_copy_only_at_the_commit() -> None:
    model, session = make()
    new = fresh(model)
    update = session.begin(BeginUpdate(version=4, mode="undo"))
    session.receive(new.items(), lasting=True)
    assert update.undo._memory.numel() == 0
    session.prepare(4)
    assert update.undo._starts.keys() == set(session.catalog.names)
    session.commit(4)
    assert_holds(model, new)


def test_an_undone_update_leaves_what_an_older_one_tore() -> None:
    model, session = make()
    new = fresh(model)
    session.begin(BeginUpdate(version=4, mode="in_place", partial=True))
    feed(session, {NORM: new[NORM]})
    session.abort(4)
    refusal, torn = session.refusal, contents(model)
    session.begin(BeginUpdate(version=5, mode="undo", owner="a"))
    feed(session, new)
    session.abort(5, "a")
    assert_holds(model, torn)
    assert session.refusal == refusal
    session.begin(BeginUpdate(version=5, mode="undo", owner="a"))
    feed(session, {NORM: new[NORM]})
    session.begin(BeginUpdate(version=5, mode="undo", owner="a"))
    assert_holds(model, torn)
    feed(session, new)
    session.commit(5, "a")
    session.require_servable()
    assert_holds(model, new)


def test_lent_tensors_wait_for_the_commit_in_either_mode() -> None:
    model, session = make()
    before, new = contents(model), fresh(model)
    session.begin(BeginUpdate(version=4, mode="in_place"))
    session.receive(new.items(), lasting=True)
    assert_holds(model, before)
    session.require_servable()
    session.abort(4)
    session.require_servable()


def test_weights_that_are_gone_take_a_whole_update() -> None:
    model, session = make()
    new = fresh(model)
    session.invalidate("the weights were released without a backup")
    with pytest.raises(WeightUpdateError, match="without a backup"):
        session.require_servable()
    session.begin(BeginUpdate(version=4, partial=True))
    session.receive([(NORM, new[NORM])])
    with pytest.raises(ManifestMismatch, match="half-written"):
        session.commit(4)
    session.abort(4)
    session.begin(BeginUpdate(version=4))
    session.receive(new.items())
    session.commit(4)
    session.require_servable()
    assert_holds(model, new)


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_the_tied_name_may_come_beside_the_first(mode: str) -> None:
    model, session = make()
    new = fresh(model)
    both = {**new, "lm_head.weight": new[EMBED].clone()}
    session.begin(BeginUpdate(version=4, manifest=specs(both), mode=mode))
    feed(session, both)
    assert session.commit(4).num_tensors == len(new)
    assert_holds(model, new)
    session.begin(BeginUpdate(version=5, mode=mode))
    with pytest.raises(ManifestMismatch, match="ties the two"):
        feed(session, {**new, "lm_head.weight": new[EMBED] + 1})
        session.commit(5)


def with_checksums(tensors: dict[str, torch.Tensor]) -> list:
    return [
        type(spec)(spec.name, spec.dtype, spec.shape, checksum(tensors[spec.name]))
        for spec in specs(tensors)
    ]


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_checksums_are_held_against_what_came(mode: str) -> None:
    model, session = make()
    before, new = contents(model), fresh(model)
    manifest = with_checksums(new)
    spoiled = {**new, NORM: new[NORM].clone()}
    spoiled[NORM][3] += 1e-3
    session.begin(BeginUpdate(version=4, manifest=manifest, mode=mode))
    feed(session, spoiled)
    with pytest.raises(ChecksumMismatch, match=r"norm\.weight arrived") as refusal:
        session.commit(4)
    assert refusal.value.field == NORM
    if mode == "shadow":
        assert_holds(model, before)
        session.require_servable()
    else:
        with pytest.raises(WeightUpdateError):
            session.require_servable()
    session.abort(4)
    if mode != "in_place":
        assert_holds(model, before)
        session.require_servable()
    session.begin(BeginUpdate(version=4, manifest=manifest, mode=mode))
    feed(session, new)
    session.commit(4)
    assert_holds(model, new)
    session.require_servable()


def test_an_update_is_dropped_when_its_time_is_up() -> None:
    model, session = make()
    new = fresh(model)
    for late in (lambda: session.receive(new.items()), lambda: session.commit(4)):
        session.begin(BeginUpdate(version=4, timeout_s=0.01))
        time.sleep(0.02)
        with pytest.raises(UpdateTimeout, match="not committed within"):
            late()
        assert session.open_version is None
    with pytest.raises(UpdateOrder, match="not committed within"):
        session.commit(4)
    session.begin(BeginUpdate(version=4, timeout_s=0.01))
    time.sleep(0.02)
    session.begin(BeginUpdate(version=5))
    session.receive(new.items())
    session.commit(5)


def test_the_same_begin_again_starts_the_update_again() -> None:
    model, session = make()
    new = fresh(model)
    session.begin(BeginUpdate(version=4, owner="a"))
    session.receive(new.items())
    with pytest.raises(ManifestMismatch, match="came twice"):
        session.receive(new.items())
    session.begin(BeginUpdate(version=4, owner="a"))
    session.receive(new.items())
    session.commit(4, "a")


def test_released_weights_refuse_every_step_of_an_update() -> None:
    released = threading.Event()

    def require_weights() -> None:
        if released.is_set():
            raise MemoryReleased("weights are released; resume 'weights' first", field="weights")

    model, session = make(require_weights=require_weights)
    new = fresh(model)
    released.set()
    with pytest.raises(MemoryReleased, match="resume"):
        session.begin(BeginUpdate(version=4))
    released.clear()
    session.begin(BeginUpdate(version=4))
    released.set()
    for step in (lambda: session.receive(new.items()), lambda: session.commit(4)):
        with pytest.raises(MemoryReleased):
            step()
    released.clear()
    session.receive(new.items())
    session.commit(4)


def test_a_piece_unlike_its_announcement_or_unknown() -> None:
    model, session = make()
    new = fresh(model)
    session.begin(BeginUpdate(version=4, manifest=specs(new)))
    with pytest.raises(ManifestMismatch, match="bfloat16"):
        session.expect([TensorPiece(NORM, "bfloat16", [16])])
    with pytest.raises(ManifestMismatch, match="no tensor of this model"):
        session.expect([TensorPiece("model.nothing", "float32", [16])])
    with pytest.raises(ManifestMismatch, match="shape"):
        session.expect([TensorPiece(NORM, "float32", [17])])
    with pytest.raises(ManifestMismatch, match="came twice"):
        session.expect(
            [TensorPiece(NORM, "float32", [16], 0, 9), TensorPiece(NORM, "float32", [16], 8)]
        )
    feed(session, new)
    session.commit(4)


class Pair:
    """Two ranks whose `agree` is the minimum, as `Collectives.minimum` is."""

    def __init__(self, **options) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._values = [0, 0]
        self.models, self.sessions = [], []
        for rank in range(2):
            model, _ = make_rank(rank, 2)
            mine = {key: value[rank] for key, value in options.items()}
            session = UpdateSession(model, version=3, agree=self._agree_of(rank), **mine)
            self.models.append(model)
            self.sessions.append(session)

    def _agree_of(self, rank: int):
        def agree(value: int) -> int:
            self._values[rank] = value
            self._barrier.wait()
            least = min(self._values)
            self._barrier.wait()
            return least

        return agree

    def run(self, *calls) -> list[Exception | None]:
        """One call a rank at once; the error of each."""
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(call) for call in calls]
            return [future.exception(10) for future in futures]

    def both(self, act) -> list[Exception | None]:
        """The same on both ranks."""
        return self.run(*(lambda session=session: act(session) for session in self.sessions))


def test_ranks_take_the_mode_that_fits_all() -> None:
    pair = Pair(free=[lambda _d: 1 << 40, lambda _d: 0])
    assert pair.both(lambda s: s.begin(BeginUpdate(version=4))) == [None, None]
    assert [s.keeps_memory() for s in pair.sessions] == [False, False]
    assert pair.both(lambda s: s.abort(4)) == [None, None]
    first, second = pair.both(lambda s: s.begin(BeginUpdate(version=4, mode="shadow")))
    assert isinstance(first, WeightUpdateError) and "another rank" in str(first)
    assert isinstance(second, OutOfMemory)
    assert [s.open_version for s in pair.sessions] == [None, None]


def test_no_rank_commits_what_another_refuses() -> None:
    pair = Pair()
    new = fresh(pair.models[0])
    before = [contents(model) for model in pair.models]
    manifest = with_checksums(new)
    assert pair.both(lambda s: s.begin(BeginUpdate(version=4, manifest=manifest))) == [None, None]
    spoiled = {**new, NORM: new[NORM] + 1}
    pair.sessions[0].receive(new.items())
    pair.sessions[1].receive(spoiled.items())
    first, second = pair.both(lambda s: s.commit(4))
    assert isinstance(first, WeightUpdateError) and isinstance(second, ChecksumMismatch)
    for model, old in zip(pair.models, before, strict=True):
        held = contents(model)
        assert all(torch.equal(held[name], old[name]) for name in old)


def test_an_update_that_failed_on_one_rank_is_over_for_all_at_the_next_begin() -> None:
    pair = Pair()
    new = fresh(pair.models[0])
    assert pair.both(lambda s: s.begin(BeginUpdate(version=4))) == [None, None]
    pair.sessions[0]._close("its sender is gone")
    assert [s.open_version for s in pair.sessions] == [None, 4]
    assert pair.both(lambda s: s.begin(BeginUpdate(version=5))) == [None, None]
    for session in pair.sessions:
        session.receive(new.items())
    assert pair.both(lambda s: s.commit(5)) == [None, None]
    for model in pair.models:
        assert_holds(model, new)


def test_no_rank_receives_what_another_cannot() -> None:
    pair = Pair()
    plan = pieces(fresh(pair.models[0]))
    begin = BeginUpdate(version=4, mode="in_place")
    assert pair.both(lambda s: s.begin(begin)) == [None, None]

    def start(session: UpdateSession, refusal: WeightUpdateError | None) -> None:
        with session.receiving(plan, refusal):
            raise AssertionError("a transfer began")

    mine = WeightUpdateError("cannot map")
    first, second = pair.run(
        lambda: start(pair.sessions[0], None), lambda: start(pair.sessions[1], mine)
    )
    assert isinstance(first, WeightUpdateError) and "another rank" in str(first)
    assert second is mine
    assert [s.refusal for s in pair.sessions] == ["", ""]
