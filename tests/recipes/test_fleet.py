"""Requests dealt to several engines, and put back in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.errors import ContextTooLong
from engine.protocol import Reply, Request, RequestOutput
from recipes.fleet import FleetActor, _deal
from recipes.world import World
from tests.helpers.char_model import char_model
from tests.helpers.engines import request
from tests.helpers.fake_actor import FakeActor


class FakeReplica:
    """The part of a replica that a fleet uses, over the engine made of transformers."""

    def __init__(self) -> None:
        self.actor = FakeActor(char_model(16, 1), [0])
        self.seen: list[str] = []
        self.commands: list[Any] = []
        self.closed = False
        self._waiting: list[RequestOutput] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.seen += [r.rid for r in requests]
        self._waiting += self.actor.generate(requests)

    def step(self) -> list[RequestOutput]:
        outputs, self._waiting = self._waiting, []
        return outputs[::-1]

    def idle(self) -> bool:
        return not self._waiting

    def send(self, command: Any) -> Reply:
        self.commands.append(command)
        return Reply()

    def state(self) -> Any:
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
    return FleetActor(replicas, World(), device=torch.device("cpu")), replicas  # type: ignore


def test_groups_stay_whole_and_are_dealt_evenly() -> None:
    parts = _deal(requests(5, 3), 2)
    assert [sorted({r.group for r in part}) for part in parts] == [["0", "2", "4"], ["1", "3"]]
    assert sum(map(len, parts)) == 15
    alone = [request(str(i), [1]) for i in range(4)]
    assert [len(part) for part in _deal(alone, 2)] == [2, 2]


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

    from engine.protocol import FinishReason

    actor, replicas = fleet(1)
    generate = replicas[0].actor.generate
    finish = FinishReason(type="abort", message="too long", error="ContextTooLong")

    def refusing(asked: Sequence[Request]) -> list[RequestOutput]:
        return [replace(output, finish=finish) for output in generate(asked)]

    monkeypatch.setattr(replicas[0].actor, "generate", refusing)
    with pytest.raises(ContextTooLong, match="0-0: too long"):
        actor.generate(requests(1, 1))


def test_every_engine_is_flushed_and_closed() -> None:
    actor, replicas = fleet(2)
    actor.flush()
    actor.sleep()
    actor.close()
    assert all(len(replica.commands) == 1 and replica.closed for replica in replicas)
