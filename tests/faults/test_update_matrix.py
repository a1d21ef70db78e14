"""An update that fails at any point: the old version serves bit for bit, or nothing serves and
the engine says why; never a mixture. The next whole update works."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from engine.errors import SlipstreamError, WeightUpdateError
from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate, PrepareUpdate, TensorSpec
from engine.quant.base import LinearMethod, Unquantized
from engine.quant.int8 import Int8
from engine.weights.checksum import checksum
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from tests.helpers import update_carriers
from tests.helpers.update_faults import ERRORS, counting, fault
from tests.helpers.weight_engines import Tensors, fresh, make_rank, specs, storages

pytestmark = pytest.mark.slow

PLAIN = Unquantized()
SCHEMES: dict[str, LinearMethod] = {"none": PLAIN, "int8": Int8("torch")}
MODES = ("shadow", "undo", "in_place")
STEPS = ("begin", "receive", "prepare", "commit", "abort")
KINDS = ("operation", "call")
CASES_IN_A_SLICE = 16


class Engine:
    """One rank that is updated over and over by one carrier in one mode.

    linear: what it stores weights as; what it should store of an update is what a second one does
    that loads it.
    """

    def __init__(self, mode: str, carrier: str, folder: Path, linear: LinearMethod = PLAIN) -> None:
        self.model, self.rank = make_rank(num_layers=1, linear=linear)
        self.serving = storages(self.model)
        self.version = self.rank.session.version
        self._mode = mode
        self._carrier = update_carriers.make(carrier, self.rank, folder)
        new, other = (fresh(self.model, seed) for seed in (1, 2))
        # In another order, so that no update finds what the engine remembers of the one before:
        # each passes every point.
        self._weights = [new, dict(reversed(other.items()))]
        # What comes in part has no checksums; the carrier "summed" brings the whole.
        manifest = specs if carrier == "excerpts" else manifest_of
        self._manifests = [(new, manifest(new)) for new in self._weights]
        self._stored = [(new, stored_by(linear, new)) for new in self._weights]
        self._asked = 10

    def close(self) -> None:
        """Leave groups and give memory back."""
        close = getattr(self._carrier, "close", None)
        self._carrier.recover()
        self.rank.close()
        if close is not None:
            close()

    def steps(self, *, last: str) -> tuple[Tensors, list[tuple[str, Callable[[], object]]]]:
        """The weights of the next update, and its commands up to `last`."""
        self._asked += 10
        version, handle = self._asked, self.rank.handle
        self._weights.reverse()
        new = self._weights[0]
        self._carrier.prepare(new)
        manifest = next(manifest for tensors, manifest in self._manifests if tensors is new)
        begin = BeginUpdate(version=version, manifest=manifest, mode=self._mode)
        every: list[tuple[str, Callable[[], object]]] = [
            ("begin", lambda: handle(begin)),
            ("receive", self._carrier.receive),
            ("prepare", lambda: handle(PrepareUpdate(version=version))),
            ("commit", lambda: handle(CommitUpdate(version=version))),
            ("abort", lambda: handle(AbortUpdate(version=version))),
        ]
        if last == "abort":
            every = [step for step in every if step[0] != "commit"]
        names = [name for name, _ in every]
        return new, every[: names.index(last) + 1]

    def points(self, step: str, kind: str) -> int:
        """How many points of `kind` a step passes."""
        _, commands = self.steps(last=step)
        for name, run in commands:
            if name == step:
                with counting(kind) as count:
                    run()
                passed = count()
            else:
                run()
        self.give_up()
        self.publish()
        return passed

    def fail(self, step: str, kind: str, at: int, error: Exception) -> Tensors:
        """Run an update whose `step` fails at point `at`; what it would have brought."""
        new, commands = self.steps(last=step)
        for name, run in commands:
            if name != step:
                run()
                continue
            try:
                with fault(kind, at, error):
                    run()
            except (RuntimeError, MemoryError, SlipstreamError) as raised:
                # Frames of the transfer hold its group, and the sender waits for that to close.
                raised.__traceback__ = error.__traceback__ = None
                continue
            raise AssertionError(f"{step} has no {kind} {at}")
        return new

    def give_up(self) -> None:
        """What the leader does when an update failed."""
        self.rank.handle(AbortUpdate(version=self._asked))
        self._carrier.recover()

    def publish(self) -> None:
        """A whole update that works."""
        new, commands = self.steps(last="commit")
        for _, run in commands:
            run()
        self.serving, self.version = self._stored_of(new), self._asked
        self.check(new)
        self.rank.session.require_servable()

    def check(self, failed: Tensors) -> None:
        """The old version serves, or the failed one after all, or nothing does."""
        session, live = self.rank.session, storages(self.model)
        refusal = _refusal(self.rank)
        assert refusal == session.refusal
        if refusal:
            assert len(refusal) > 40, "a refusal says why"
            return
        serves_old = session.version == self.version
        want = self.serving if serves_old else self._stored_of(failed)
        wrong = [name for name in live if not torch.equal(live[name], want[name])]
        assert not wrong, f"{len(wrong)} of {len(live)} tensors are of another version"

    def _stored_of(self, new: Tensors) -> Tensors:
        return next(stored for tensors, stored in self._stored if tensors is new)


def stored_by(linear: LinearMethod, new: Tensors) -> Tensors:
    """What an engine stores that loads these weights when it starts."""
    model, rank = make_rank(num_layers=1, linear=linear)
    load_initial(rank.session.catalog, new.items())
    return storages(model)


def manifest_of(new: Tensors) -> list[TensorSpec]:
    """Half of the tensors announce their checksums."""
    return [
        replace(spec, checksum=checksum(new[spec.name]) if index % 2 else None)
        for index, spec in enumerate(specs(new))
    ]


def _refusal(rank: WeightService) -> str:
    try:
        rank.session.require_servable()
    except WeightUpdateError as error:
        return error.message
    return ""


def run_case(engine: Engine, step: str, kind: str, at: int) -> bool:
    """One fault, what must hold after it, and the next update; whether the engine refused."""
    failed = engine.fail(step, kind, at, ERRORS[at % len(ERRORS)]())
    engine.check(failed)
    engine.give_up()
    engine.check(failed)
    refused = bool(engine.rank.session.refusal)
    engine.publish()
    return refused


SLICES = [("none", carrier) for carrier in update_carriers.NAMES] + [("int8", "consumed")]


@pytest.mark.parametrize(("scheme", "carrier"), SLICES)
@pytest.mark.parametrize("mode", MODES)
def test_a_fault_leaves_the_old_version_or_a_refusal(
    mode: str, scheme: str, carrier: str, tmp_path: Path
) -> None:
    """A seeded slice of the matrix below."""
    engine = Engine(mode, carrier, tmp_path, SCHEMES[scheme])
    draw = random.Random(f"{mode} {carrier}")
    points = {(s, k): engine.points(s, k) for s in STEPS for k in KINDS}
    possible = [(s, k) for (s, k), count in points.items() if count]
    assert ("commit", "operation") in possible or mode != "shadow"
    for index in range(CASES_IN_A_SLICE):
        step, kind = possible[index % len(possible)]
        at = draw.randint(1, points[step, kind])
        refused = run_case(engine, step, kind, at)
        if mode == "undo" and kind == "operation" and step not in ("abort", "begin"):
            assert not refused, f"{step} {kind} {at}: everything can be put back"
    engine.close()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("carrier", update_carriers.NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_a_fault_at_every_point_of_a_step(
    scheme: str, mode: str, carrier: str, step: str, tmp_path: Path
) -> None:
    """Nothing is left out but: a second layer, whose tensors are of the first one's kinds;
    generators that are resumed, and how often a wait looks up, which depends on the time."""
    engine = Engine(mode, carrier, tmp_path, SCHEMES[scheme])
    for kind in KINDS:
        for at in range(1, engine.points(step, kind) + 1):
            try:
                run_case(engine, step, kind, at)
            except BaseException as error:
                error.add_note(f"{scheme}, {mode}, {carrier}, {step}, {kind} {at}")
                raise
    engine.close()
