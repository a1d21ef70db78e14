"""Engines that step by themselves: fed at any time, taken back, lost and back again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import EngineDead
from engine.protocol import Request, RequestOutput
from recipes.actors.fleet import MOST_LOSSES
from recipes.actors.fleet_engine import FleetEngine
from recipes.asynchrony.fleet_stream import FleetStream
from tests.helpers.engines import make_replica, request
from tests.helpers.tiny_models import write_tiny

NUM, SAMPLES, LENGTH = 6, 2, 9


class Mortal:
    """A replica that dies after so many steps."""

    def __init__(self, folder: Path, steps_left: int = 10**9) -> None:
        self.replica = make_replica(folder)
        self.steps_left = steps_left
        self.seen: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        if self.steps_left < 0 and name != "close":
            raise EngineDead("it was killed", field="leader")
        return getattr(self.replica, name)

    def submit(self, requests: list[Request]) -> None:
        if self.steps_left < 0:
            raise EngineDead("it was killed", field="leader")
        self.seen += requests
        self.replica.submit(requests)

    def step(self) -> list[RequestOutput]:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise EngineDead("it was killed", field="leader")
        return self.replica.step()


class Fleet:
    """Two engines, and every replica that there has been."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.replicas = [Mortal(folder), Mortal(folder)]
        self.lives: list[int] = []
        self.engines = [
            FleetEngine(place, replica, self.launch)  # type: ignore[arg-type]
            for place, replica in enumerate(self.replicas)
        ]

    def launch(self) -> Any:
        self.replicas.append(Mortal(self.folder, self.lives.pop() if self.lives else 10**9))
        return self.replicas[-1]

    def restore(self) -> None:
        for engine in self.engines:
            engine.revive()


class Idle:
    """Engines that say how long they have had nothing to do, one after the other in turn."""

    def __init__(self, told: list[dict[int, float]]) -> None:
        self.told = [(place, idle) for each in told for place, idle in each.items()]
        self.engines: Any = [self, self]

    def state(self) -> Any:
        return SimpleNamespace(idle_s=self.told.pop(0)[1])

    def restore(self) -> None:
        raise AssertionError("none was lost")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "llama")
    return folder


@pytest.fixture
def fleet(tiny: Path) -> Iterator[Fleet]:
    made = Fleet(tiny)
    yield made
    for engine in made.engines:
        engine.close()


def asked() -> list[Request]:
    return [
        request(
            f"r{index}-{sample}",
            [5, 6, 7 + index],
            seed=10 * index + sample,
            group=f"g{index}",
            max_new_tokens=LENGTH,
        )
        for index in range(NUM)
        for sample in range(SAMPLES)
    ]


def drained(stream: FleetStream) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for _ in range(400):
        found.update((output.rid, output.token_ids.tolist()) for output in stream.poll())
    return found


def test_groups_go_whole_to_the_engine_with_the_fewest(fleet: Fleet) -> None:
    stream = FleetStream(fleet)
    stream.submit(asked())
    found = drained(stream)
    assert set(found) == {each.rid for each in asked()}
    groups = [{each.group for each in replica.seen} for replica in fleet.replicas]
    assert groups[0].isdisjoint(groups[1]) and len(groups[0]) == len(groups[1]) == NUM // 2


@pytest.mark.parametrize("steps", [0, 4])
def test_what_a_lost_engine_was_working_on_is_asked_again(fleet: Fleet, steps: int) -> None:
    stream = FleetStream(fleet)
    stream.submit(asked())
    expected = drained(stream)
    fleet.replicas[0].steps_left = steps
    stream.submit(asked())
    assert drained(stream) == expected
    assert len(fleet.replicas) == 3


def test_a_request_for_an_engine_that_is_gone_is_not_lost(fleet: Fleet) -> None:
    fleet.replicas[1].steps_left = -1
    stream = FleetStream(fleet)
    stream.submit(asked())
    assert len(drained(stream)) == NUM * SAMPLES


def test_an_engine_that_dies_again_and_again_ends_the_run(fleet: Fleet) -> None:
    fleet.replicas[0].steps_left = 0
    fleet.lives = [0] * MOST_LOSSES
    stream = FleetStream(fleet)
    stream.submit(asked())
    with pytest.raises(EngineDead, match="it was killed"):
        drained(stream)
    assert len(fleet.replicas) == 2 + MOST_LOSSES


def test_what_is_taken_back_has_the_tokens_so_far(fleet: Fleet) -> None:
    stream = FleetStream(fleet)
    stream.submit(asked())
    expected = drained(stream)
    stream.submit(asked())
    early = [output for _ in range(4) for output in stream.poll()]
    taken = [*early, *stream.withdraw()]
    assert {output.rid for output in taken} == set(expected)
    for output in taken:
        num = len(output.token_ids)
        assert output.token_ids.tolist() == expected[output.rid][:num]
    assert any(0 < len(output.token_ids) < LENGTH for output in taken)
    assert stream.poll() == []


def test_what_engines_wait_is_counted_since_the_last_call() -> None:
    told = [{0: 1.0, 1: 2.0}, {0: 1.5, 1: 5.0}, {0: 0.25, 1: 6.0}]
    stream = FleetStream(Idle(told))
    assert stream.waits() == {"async/engine_wait_s": (0.5 + 3.0) / 2}
    # The first was started again.
    assert stream.waits() == {"async/engine_wait_s": (0.25 + 1.0) / 2}
