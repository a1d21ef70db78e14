"""Requests dealt to several engines, and put back in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import ContextTooLong, EngineDead, ManifestMismatch, UpdateOrder
from engine.protocol import (
    BeginUpdate,
    CommitUpdate,
    FinishReason,
    GetState,
    JoinGroup,
    PrepareUpdate,
    ReceiveBroadcast,
    Reply,
    Request,
    RequestOutput,
)
from recipes.actors import fleet_engine
from recipes.actors.engines import ReplicaEngines, deal
from recipes.actors.fleet import FleetActor
from recipes.world import World
from tests.helpers.char_model import char_model
from tests.helpers.engines import make_replica, request
from tests.helpers.fake_actor import FakeActor
from tests.helpers.tiny_models import tiny_hf, write_tiny


class FakeReplica:
    """The part of a replica that a fleet uses, over the engine made of transformers."""

    def __init__(self) -> None:
        self.actor = FakeActor(char_model(16, 1), [0])
        self.seen: list[str] = []
        self.commands: list[Any] = []
        self.closed = False
        self.dies_at: int | None = None
        self._waiting: list[RequestOutput] = []

    def submit(self, requests: Sequence[Request]) -> None:
        """Dies with the request after number `dies_at`, having answered those before it."""
        self.seen += [r.rid for r in requests]
        self._waiting += self.actor.generate(requests)

    def step(self) -> list[RequestOutput]:
        if self.dies_at is not None and len(self.seen) > self.dies_at:
            answered = [o for o in self._waiting if o.rid in self.seen[: self.dies_at]]
            self._waiting = [o for o in self._waiting if o not in answered]
            if not answered:
                raise EngineDead("the leader was killed", field="leader")
            return answered
        outputs, self._waiting = self._waiting, []
        return outputs[::-1]

    def idle(self) -> bool:
        return not self._waiting

    def send(self, command: Any) -> Reply:
        self.commands.append(command)
        return Reply()

    def state(self) -> Any:
        if self.dies_at is not None and len(self.seen) > self.dies_at:
            raise EngineDead("the leader was killed", field="leader")
        return self.actor.state()

    def close(self) -> None:
        self.closed = True


def requests(groups: int, samples: int) -> list[Request]:
    return [
        request(f"{g}-{s}", [1, 2, g + 1], seed=s, group=str(g), max_new_tokens=2)
        for g in range(groups)
        for s in range(samples)
    ]


def fleet(num: int) -> tuple[FleetActor, list[FakeReplica]]:
    replicas = [FakeReplica() for _ in range(num)]
    engines = ReplicaEngines(replicas)  # type: ignore
    return FleetActor(engines, World(), device=torch.device("cpu")), replicas


def test_groups_stay_whole_and_are_dealt_evenly() -> None:
    parts = deal(requests(5, 3), 2)
    assert [sorted({r.group for r in part}) for part in parts] == [["0", "2", "4"], ["1", "3"]]
    assert sum(map(len, parts)) == 15
    alone = [request(str(i), [1]) for i in range(4)]
    assert [len(part) for part in deal(alone, 2)] == [2, 2]


def test_outputs_come_in_the_order_of_the_requests() -> None:
    actor, replicas = fleet(2)
    asked = requests(3, 2)
    outputs = actor.generate(asked)
    assert [output.rid for output in outputs] == [r.rid for r in asked]
    assert [len(replica.seen) for replica in replicas] == [4, 2]
    single, _ = fleet(1)
    for ours, theirs in zip(outputs, single.generate(asked), strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert actor.generate([]) == []


def test_a_refused_request_raises_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from msgspec.structs import replace

    actor, replicas = fleet(1)
    generate = replicas[0].actor.generate
    finish = FinishReason(type="abort", message="too long", error="ContextTooLong")

    def refusing(asked: Sequence[Request]) -> list[RequestOutput]:
        return [replace(output, finish=finish) for output in generate(asked)]

    monkeypatch.setattr(replicas[0].actor, "generate", refusing)
    with pytest.raises(ContextTooLong, match="0-0: too long"):
        actor.generate(requests(1, 1))


@pytest.mark.parametrize("kind,lost", [("NoVersion", True), ("ContextTooLong", False)])
def test_an_engine_without_whole_weights_is_lost_and_answers_nothing(
    kind: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(1, 2)
    finish = FinishReason(type="abort", message="publish a whole version", error=kind)
    none = np.zeros(0, np.int32)
    outputs = [
        RequestOutput(
            rid=r.rid, start=0, token_ids=none, logprobs=none.view(np.float32), finish=finish
        )
        for r in asked
    ]
    monkeypatch.setattr(fleet_engine, "run", lambda *_, **__: iter(outputs))
    done: dict[str, RequestOutput] = {}
    error = fleet_engine.FleetEngine(0, FakeReplica(), None).generate(asked, done)
    assert (error is not None, len(done)) == (lost, 0 if lost else 2)


def test_every_engine_is_flushed_and_closed() -> None:
    actor, replicas = fleet(2)
    actor.flush()
    actor.sleep()
    actor.close()
    assert all(len(replica.commands) == 1 and replica.closed for replica in replicas)


def launching(num: int) -> tuple[FleetActor, list[FakeReplica], list[FakeReplica]]:
    """A fleet, its first replicas, and those that were started since."""
    replicas, started = [FakeReplica() for _ in range(num)], []

    def launch(place: int) -> FakeReplica:
        started.append(FakeReplica())
        return started[-1]

    engines = ReplicaEngines(replicas, launch)  # type: ignore
    actor = FleetActor(engines, World(), device=torch.device("cpu"))
    return actor, replicas, started


@pytest.mark.parametrize("dies_at", [0, 1, 3])
def test_requests_that_die_with_their_engine_are_asked_again(dies_at: int) -> None:
    actor, replicas, started = launching(2)
    replicas[1].dies_at = dies_at
    asked = requests(4, 2)
    outputs = actor.generate(asked)
    whole, _, _ = launching(1)
    for ours, theirs in zip(outputs, whole.generate(asked), strict=True):
        assert (ours.rid, ours.token_ids.tolist()) == (theirs.rid, theirs.token_ids.tolist())
    assert len(started) == 1 and replicas[1].closed
    again = [rid for replica in (replicas[0], *started) for rid in replica.seen]
    assert len(again) == len(asked) - dies_at, "what was answered is not asked again"


def test_an_engine_that_keeps_dying_ends_the_call_with_its_error() -> None:
    actor, replicas, started = launching(1)
    replicas[0].dies_at = 0

    def launch() -> FakeReplica:
        started.append(FakeReplica())
        started[-1].dies_at = 0
        return started[-1]

    actor._engines.targets[0]._launch = launch
    with pytest.raises(EngineDead, match="the leader was killed"):
        actor.generate(requests(2, 2))
    assert len(started) == 3


def test_an_engine_of_somebody_else_is_not_started() -> None:
    actor, replicas = fleet(2)
    replicas[1].dies_at = 0
    with pytest.raises(EngineDead, match="engine 1 is gone: the leader was killed"):
        actor.generate(requests(2, 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "llama")
    return folder


class Mortal:
    """A replica that dies when told to, between calls or in the middle of a batch."""

    def __init__(self, folder: Path) -> None:
        self._replica = make_replica(folder)
        self.dead = False
        self.steps_left: int | None = None
        self.dies_at: type | None = None

    def __getattr__(self, name: str) -> Any:
        if self.dead and name != "close":
            raise EngineDead("it was killed", field="leader")
        return getattr(self._replica, name)

    def step(self) -> list[RequestOutput]:
        if self.steps_left is not None:
            self.steps_left -= 1
            self.dead = self.steps_left < 0
        if self.dead:
            raise EngineDead("it was killed", field="leader")
        return self._replica.step()

    def send(self, command: Any) -> Reply:
        self.dead = self.dead or type(command) is self.dies_at
        if self.dead:
            raise EngineDead("it was killed", field="leader")
        return self._replica.send(command)


@pytest.fixture
def mortals(tiny: Path) -> Iterator[tuple[FleetActor, list[Mortal]]]:
    """A fleet of two real engines, and every replica that there has been, in order."""
    replicas = [Mortal(tiny) for _ in range(2)]

    def launch(place: int) -> Mortal:
        replicas.append(Mortal(tiny))
        return replicas[-1]

    engines = ReplicaEngines(replicas[:2], launch)  # type: ignore
    actor = FleetActor(engines, World(), device=torch.device("cpu"))
    yield actor, replicas
    actor.close()


def replies(actor: FleetActor) -> list[tuple[list[int], list[int]]]:
    asked = [request(f"r{i}", [5, 6, 7 + i], seed=i, max_new_tokens=8) for i in range(6)]
    return [
        (output.token_ids.tolist(), [span.version for span in output.spans])
        for output in actor.generate(asked)
    ]


@pytest.mark.parametrize("steps", [0, 3])
def test_a_restarted_engine_takes_the_version_that_the_others_serve(mortals, steps: int) -> None:
    actor, replicas = mortals
    model = tiny_hf("llama", seed=1)
    actor.push(model, 4, measure_memcpy=False)
    before = replies(actor)
    assert {version for _, versions in before for version in versions} == {4}
    replicas[0].steps_left = steps
    assert replies(actor) == before
    assert len(replicas) == 3 and replicas[2].state().version == 4
    actor.push(model, 5, measure_memcpy=False)
    assert [tokens for tokens, _ in replies(actor)] == [tokens for tokens, _ in before]


def test_an_engine_that_was_restarted_unseen_is_published_to_again(mortals, tiny: Path) -> None:
    actor, replicas = mortals
    actor.push(tiny_hf("llama", seed=1), 4, measure_memcpy=False)
    before = replies(actor)
    replicas[1]._replica.close()
    replicas[1]._replica = make_replica(tiny)
    assert replies(actor) == before
    assert len(replicas) == 2


@pytest.mark.parametrize(
    "kind", [GetState, BeginUpdate, JoinGroup, ReceiveBroadcast, PrepareUpdate, CommitUpdate]
)
def test_an_engine_that_dies_in_a_push_takes_part_when_it_is_back(mortals, kind: type) -> None:
    actor, replicas = mortals
    replicas[1].dies_at = kind
    assert actor.push(tiny_hf("llama", seed=1), 4, measure_memcpy=False).version == 4
    assert len(replicas) == 3
    assert replicas[0].state().version == replicas[2].state().version == 4
    assert {version for _, versions in replies(actor) for version in versions} == {4}


def test_an_update_that_is_wrong_is_not_tried_again(mortals) -> None:
    actor, replicas = mortals
    with pytest.raises(ManifestMismatch, match=r"engine 0: model\.layers"):
        actor.push(tiny_hf("llama", num_hidden_layers=1), 4, measure_memcpy=False)
    assert len(replicas) == 2
    assert {version for _, versions in replies(actor) for version in versions} == {0}


def test_versions_are_counted_from_the_beginning_of_the_run(tiny: Path) -> None:
    replica = make_replica(tiny)
    engines = ReplicaEngines([replica], base=7)
    actor = FleetActor(engines, World(), device=torch.device("cpu"))
    model = tiny_hf("llama", seed=1)
    for version in (0, 1):
        actor.push(model, version, measure_memcpy=False)
        assert (replica.state().version, actor.state().version) == (7 + version, version)
        assert {version for _, versions in replies(actor) for version in versions} == {version}
    # Another run, which has seen what this one published.
    other = FleetActor(ReplicaEngines([replica], base=9), World(), device=torch.device("cpu"))
    other.push(model, 0, measure_memcpy=False)
    with pytest.raises(UpdateOrder, match="does not go forward"):
        replies(actor)
    actor.close()
