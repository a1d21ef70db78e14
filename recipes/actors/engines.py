"""The engines of a `FleetActor`, as its main process sees them: what a fleet asks of them, and
engines that each have a replica of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Protocol

from engine.errors import EngineDead, FleetDivided, SlipstreamError
from engine.protocol import FlushCache, ReplicaState, Request, RequestOutput
from recipes.actors.fleet_engine import FleetEngine
from rollout.replica.base import Replica
from trainer_bridge.update_target import UpdateTarget


class Engines(Protocol):
    """Who rolls out and takes weights."""

    @property
    def targets(self) -> Sequence[UpdateTarget]:
        """Who takes updates: one list, which changes in place."""
        ...

    @property
    def base(self) -> int:
        """What their versions are counted from; a run's version v is theirs `base + v`."""
        ...

    def generate(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> SlipstreamError | None:
        """Run requests; final outputs go to `done` by id. Returns the first error by which an
        engine was lost; the requests that it took with it are not in `done`."""
        ...

    def behind(self, version: int) -> list[str]:
        """Names of the engines that do not serve `version`, all of it."""
        ...

    def revive(self) -> None:
        """Have the engines there that are to take the next update. Raises the error of one that
        cannot be had."""
        ...

    def is_loss(self, error: SlipstreamError) -> bool:
        """Whether an update failed because an engine was lost, not for what it brought."""
        ...

    def flush(self) -> None:
        """Have all that live forget cached prefixes."""
        ...

    def state(self) -> ReplicaState:
        """What the first of them is. Raises EngineDead."""
        ...

    def close(self) -> None:
        """Leave them, or free them."""
        ...


class ReplicaEngines:
    """`Engines` with a replica each. launch: starts the replica of a place again; without it a dead
    engine ends the run. base: as in `Engines`."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        launch: Callable[[int], Replica] | None = None,
        *,
        base: int = 0,
    ) -> None:
        self.targets = [
            FleetEngine(place, replica, None if launch is None else partial(launch, place))
            for place, replica in enumerate(replicas)
        ]
        self.base = base

    def generate(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> SlipstreamError | None:
        """See `Engines`. Groups are dealt out, each whole: its samples share their prompt's KV."""
        parts = deal(requests, len(self.targets))
        with ThreadPoolExecutor(len(parts)) as pool:
            futures = [
                pool.submit(engine.generate, part, done)
                for engine, part in zip(self.targets, parts, strict=True)
                if part
            ]
        return next((lost for future in futures if (lost := future.result()) is not None), None)

    def behind(self, version: int) -> list[str]:
        """See `Engines`."""
        return [str(e.place) for e in self.targets if not e.serves(version)]

    def revive(self) -> None:
        """See `Engines`: start those that died again."""
        for engine in self.targets:
            engine.revive()

    def is_loss(self, error: SlipstreamError) -> bool:
        """See `Engines`."""
        if isinstance(error, EngineDead | FleetDivided):
            return True
        return not all(engine.lives() for engine in self.targets)

    def flush(self) -> None:
        """See `Engines`. One that is gone has nothing to forget."""
        for engine in self.targets:
            with suppress(EngineDead):
                engine.send(FlushCache())

    def state(self) -> ReplicaState:
        """See `Engines`."""
        return self.targets[0].state()

    def close(self) -> None:
        """See `Engines`: free their replicas."""
        for engine in self.targets:
            engine.close()


def deal(requests: Sequence[Request], num: int) -> list[list[Request]]:
    """Requests in `num` parts, every other group to the next part."""
    parts: list[list[Request]] = [[] for _ in range(num)]
    places: dict[str, int] = {}
    for request in requests:
        place = places.setdefault(request.group or request.rid, len(places) % num)
        parts[place].append(request)
    return parts
