"""Two trainers that push to one engine at once, in every order: one of them publishes, the other
is told, and nothing of both is ever served. The same of ranks that get different tensors."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engine.errors import InvalidRequest, ManifestMismatch, SlipstreamError, UpdateOrder
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    IpcBuffer,
    IpcPayload,
    LoadFromDisk,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveIpc,
    TensorSpec,
    encode,
)
from engine.weights.service import WeightService
from rollout.requests.message_ranges import check_ranges
from tests.helpers.update_carriers import SharedMemoryIpc
from tests.helpers.weight_engines import (
    Tensors,
    assert_holds,
    contents,
    fresh,
    join,
    make_rank,
    pieces,
    specs,
)
from trainer_bridge.transports.disk import write

NORM = "model.norm.weight"
Step = tuple[str, Callable[[], object]]


class Trainer:
    """Publishes version 10 in two halves from folders, under an owner of its own or none."""

    def __init__(self, rank: WeightService, folder: Path, new: Tensors, owner: str) -> None:
        self.new = new
        items = list(new.items())
        halves = [items[: len(items) // 2], items[len(items) // 2 :]]
        for at, half in enumerate(halves):
            write(folder / str(at), half)
        send = rank.handle
        load = [
            LoadFromDisk(path=str(folder / str(at)), partial=True, owner=owner) for at in (0, 1)
        ]
        self.steps: list[Step] = [
            ("begin", lambda: send(BeginUpdate(version=10, owner=owner))),
            ("first", lambda: send(load[0])),
            ("second", lambda: send(load[1])),
            ("prepare", lambda: send(PrepareUpdate(version=10, owner=owner))),
            ("commit", lambda: send(CommitUpdate(version=10, owner=owner))),
        ]
        self.abort = lambda: send(AbortUpdate(version=10, owner=owner))


def _interleavings(count: int) -> list[list[int]]:
    """Orders of the five steps of two trainers: 0 and 1 say whose step is next."""
    every = [list(bits) for bits in itertools.product((0, 1), repeat=10) if sum(bits) == 5]
    return random.Random(7).sample(every, count)


def _run(order: list[int], trainers: list[Trainer], *, aborts: bool) -> list[bool]:
    """Play an order; a trainer that is refused stops, and aborts. Who committed."""
    at, stopped, committed = [0, 0], [False, False], [False, False]
    for who in order:
        if stopped[who]:
            continue
        name, step = trainers[who].steps[at[who]]
        at[who] += 1
        try:
            step()
            committed[who] = name == "commit"
        except SlipstreamError:
            stopped[who] = True
            if aborts:
                try:
                    trainers[who].abort()
                except UpdateOrder:
                    continue
    return committed


@pytest.mark.parametrize("owners", [("a", "b"), ("a", ""), ("", "b")])
@pytest.mark.parametrize("aborts", [True, False])
def test_no_order_of_two_trainers_makes_a_mixture(
    owners: tuple[str, str], aborts: bool, tmp_path: Path
) -> None:
    model, _ = make_rank()
    pushes = [fresh(model, seed) for seed in (1, 2)]
    for number, order in enumerate(_interleavings(12)):
        model, rank = make_rank()
        before = contents(model)
        trainers = [
            Trainer(rank, tmp_path / f"{number}-{who}", pushes[who], owners[who]) for who in (0, 1)
        ]
        committed = _run(order, trainers, aborts=aborts)
        assert sum(committed) <= 1, order
        rank.session.require_servable()
        # Nobody's begin was refused for nothing: who began first publishes.
        assert committed[order[0]], order
        assert_holds(model, pushes[order[0]])
        del before


def test_without_owners_a_second_begin_is_refused_once_tensors_came(tmp_path: Path) -> None:
    model, rank = make_rank()
    first = Trainer(rank, tmp_path / "1", fresh(model, 1), "")
    second = Trainer(rank, tmp_path / "2", fresh(model, 2), "")
    first.steps[0][1]()
    first.steps[0][1]()
    first.steps[1][1]()
    with pytest.raises(UpdateOrder, match="received tensors"):
        second.steps[0][1]()
    for _, step in first.steps[2:]:
        step()
    assert_holds(model, first.new)


def test_what_another_does_to_an_update_is_refused_and_named(tmp_path: Path) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    write(tmp_path / "w", new.items())
    rank.handle(BeginUpdate(version=10, owner="mine", timeout_s=77.0))
    for owner in ("", "other"):
        for command in (
            BeginUpdate(version=10, owner=owner),
            BeginUpdate(version=11, owner=owner),
            LoadFromDisk(path=str(tmp_path / "w"), owner=owner),
            ReceiveIpc(payloads=[b""], owner=owner),
            ReceiveBroadcast(group="g", tensors=[], owner=owner),
            PrepareUpdate(version=10, owner=owner),
            CommitUpdate(version=10, owner=owner),
            AbortUpdate(version=10, owner=owner),
        ):
            with pytest.raises(UpdateOrder, match=r"'mine'.*abort_update 10 .*in 7\d s"):
                rank.handle(command)
    rank.handle(LoadFromDisk(path=str(tmp_path / "w"), owner="mine"))
    report = rank.handle(CommitUpdate(version=10, owner="mine")).report
    assert rank.handle(CommitUpdate(version=10, owner="mine")).report is report
    with pytest.raises(UpdateOrder):
        rank.handle(CommitUpdate(version=10, owner="other"))
    assert_holds(model, new)
    del before


class Ranks:
    """Two ranks of one engine that agree by a barrier."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._values = [0, 0]
        made = [make_rank(rank, 2, agree=self._agree_of(rank)) for rank in (0, 1)]
        self.models = [model for model, _ in made]
        self.ranks = [rank for _, rank in made]

    def handle(self, command) -> list[BaseException | None]:
        """One command on both ranks; the error of each."""
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(rank.handle, command) for rank in self.ranks]
            return [future.exception(60) for future in futures]

    def _agree_of(self, rank: int) -> Callable[[int], int]:
        def agree(value: int) -> int:
            self._values[rank] = value
            self._barrier.wait()
            least = min(self._values)
            self._barrier.wait()
            return least

        return agree


def _payload(carrier: SharedMemoryIpc, tensors: Tensors) -> bytes:
    carrier.prepare(tensors)
    return carrier._payload


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize("borrow", [False, True])
def test_ranks_that_get_different_tensors_refuse_them(mode: str, borrow: bool) -> None:
    pair = Ranks()
    before = [contents(model) for model in pair.models]
    new = fresh(pair.models[0])
    less = {name: tensor for name, tensor in new.items() if name != NORM}
    carriers = [SharedMemoryIpc(rank) for rank in pair.ranks]
    assert pair.handle(BeginUpdate(version=4, mode=mode, partial=True)) == [None, None]
    payloads = [_payload(carriers[0], new), _payload(carriers[1], less)]
    errors = pair.handle(ReceiveIpc(payloads=payloads, borrow=borrow))
    assert [type(error) for error in errors] == [ManifestMismatch] * 2, errors
    for rank in pair.ranks:
        rank.session.require_servable()
    pair.handle(AbortUpdate(version=4))
    for model, was in zip(pair.models, before, strict=True):
        now = contents(model)
        assert all(torch.equal(now[name], was[name]) for name in was)
    for carrier in carriers:
        carrier.close()


def test_ranks_whose_folders_differ_refuse_the_commit() -> None:
    pair = Ranks()
    before = [contents(model) for model in pair.models]
    new = fresh(pair.models[0])
    assert pair.handle(BeginUpdate(version=4, partial=True)) == [None, None]
    pair.ranks[0].session.receive(new.items())
    pair.ranks[1].session.receive((n, t) for n, t in new.items() if n != NORM)
    for command in (PrepareUpdate(version=4), CommitUpdate(version=4)):
        errors = pair.handle(command)
        assert [type(error) for error in errors] == [ManifestMismatch] * 2, errors
    for model, was in zip(pair.models, before, strict=True):
        now = contents(model)
        assert all(torch.equal(now[name], was[name]) for name in was)


def _integer_commands(new: Tensors, carrier: str, rank: WeightService, folder: Path) -> object:
    """A command that brings NORM as int64, by each carrier."""
    odd = {NORM: new[NORM].to(torch.int64)}
    match carrier:
        case "disk":
            write(folder / "w", odd.items())
            return LoadFromDisk(path=str(folder / "w"), partial=True)
        case "group":
            join([rank])
            return ReceiveBroadcast(group="g", tensors=pieces(odd), layout="tensors")
        case _:
            held = SharedMemoryIpc(rank)
            payload = _payload(held, odd)
            return ReceiveIpc(payloads=[payload], borrow=carrier == "lent")


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
@pytest.mark.parametrize("carrier", ["disk", "group", "shm", "lent"])
def test_integers_are_refused_by_every_carrier(carrier: str, mode: str, tmp_path: Path) -> None:
    model, rank = make_rank()
    before = contents(model)
    command = _integer_commands(fresh(model), carrier, rank, tmp_path)
    rank.handle(BeginUpdate(version=4, mode=mode, partial=True))
    with pytest.raises(ManifestMismatch, match="int64") as refused:
        rank.handle(command)
    assert refused.value.field == NORM
    rank.session.require_servable()
    assert_holds(model, before)
    rank.close()


@pytest.mark.parametrize("dtype", ["int64", "uint8", "no_dtype", "Tensor"])
def test_a_manifest_of_no_floats_is_refused_at_the_begin(dtype: str) -> None:
    model, rank = make_rank()
    manifest = specs(fresh(model))
    manifest[-1] = TensorSpec(manifest[-1].name, dtype, manifest[-1].shape)
    with pytest.raises(ManifestMismatch, match=dtype) as refused:
        rank.handle(BeginUpdate(version=4, manifest=manifest))
    assert refused.value.field == manifest[-1].name
    assert rank.session.open_version is None


@pytest.mark.parametrize("command", [PrepareUpdate(version=4), CommitUpdate(version=4)])
@pytest.mark.parametrize("partial", [True, False])
def test_an_update_of_nothing_is_not_committed(command, partial: bool) -> None:
    _, rank = make_rank()
    rank.handle(BeginUpdate(version=4, partial=partial))
    with pytest.raises(UpdateOrder, match="nothing came"):
        rank.handle(command)
    assert rank.session.version == 3


def test_an_engine_sends_nothing_to_itself() -> None:
    model, rank = make_rank()
    join([rank])
    new = fresh(model)
    rank.handle(BeginUpdate(version=4, mode="in_place"))
    with pytest.raises(SlipstreamError, match="a rank of this engine") as refused:
        rank.handle(ReceiveBroadcast(group="g", tensors=pieces(new), source=1, layout="flat"))
    assert refused.value.field == "source"
    rank.session.require_servable()
    rank.close()


def test_versions_cannot_be_used_up() -> None:
    check_ranges(BeginUpdate(version=2**53))
    with pytest.raises(InvalidRequest) as refused:
        check_ranges(BeginUpdate(version=2**53 + 1))
    assert refused.value.field == "version"


def test_a_partial_update_that_brings_what_was_torn_makes_an_engine_whole() -> None:
    model, rank = make_rank()
    new = fresh(model)
    rank.handle(BeginUpdate(version=4, mode="in_place", partial=True))
    rank.session.receive([(NORM, new[NORM])])
    rank.handle(AbortUpdate(version=4))
    assert rank.session.refusal
    rank.handle(BeginUpdate(version=5, partial=True))
    rank.session.receive([(NORM, new[NORM])])
    assert rank.handle(CommitUpdate(version=5)).refusal == ""
    assert rank.handle(CheckWeights(action="reset_tensors")).refusal


def test_an_empty_transfer_tears_nothing() -> None:
    _, rank = make_rank()
    rank.handle(BeginUpdate(version=4, mode="in_place"))
    rank.handle(ReceiveIpc(payloads=[encode(IpcPayload([], []))]))
    rank.session.require_servable()
    missing = IpcBuffer("shm", 8, name="there-is-none")
    with pytest.raises(SlipstreamError, match="cannot be read"):
        rank.handle(ReceiveIpc(payloads=[encode(IpcPayload([missing], []))]))
