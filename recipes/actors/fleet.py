"""Engines in processes of their own, which all trainer processes publish to.

An engine that dies is started again, takes the version that the others serve, and the requests
that died with it are asked again: nothing is lost but time. Their tokens are the same, since
they depend on a request's seed and not on the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from engine.errors import EngineDead, FleetDivided, SlipstreamError
from engine.protocol import (
    BeginUpdate,
    FlushCache,
    ReplicaState,
    Request,
    RequestOutput,
    UpdateReport,
)
from recipes.actors.actor import Watcher, Weights, raise_if_failed
from recipes.actors.fleet_engine import FleetEngine
from recipes.world import World
from rollout.replica.base import Replica
from trainer_bridge import PushReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.transports.base import publish
from trainer_bridge.transports.nccl import NcclCarrier
from trainer_bridge.transports.sharded import ShardedCarrier

logger = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Engines lost in one call of `generate` or `push`, before it gives up."""


class FleetActor:
    """An `Actor` whose engines the main process speaks with; the others only send weights.

    replicas: empty but in the main process. device: where the trainer's tensors are. launch:
    starts the engine of a place again; without it a dead engine ends the run. Every trainer
    process broadcasts the shards that it holds, one alone all tensors.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        world: World,
        *,
        device: torch.device,
        launch: Callable[[int], Replica] | None = None,
    ) -> None:
        """Collective."""
        self._world = world
        self._engines = [
            FleetEngine(place, replica, None if launch is None else partial(launch, place))
            for place, replica in enumerate(replicas)
        ]
        initial = world.from_main(replicas[0].state() if replicas else None)
        assert initial is not None, "the main process has an engine"
        self._initial: ReplicaState = initial
        self._version = initial.version
        self._source: WeightSource | None = None
        self._sharded: ShardedCarrier | None = None
        self._single: NcclCarrier | None = None
        if world.size > 1:
            self._sharded = ShardedCarrier(self._engines, device=device)
        else:
            self._single = NcclCarrier(self._engines, device=device)

    def watch(self, watcher: Watcher) -> None:
        """Several engines at once are not watched."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """See `Actor`; collective, since an engine that was started again needs the weights of
        all trainer processes: they must be those of the last `push` still.

        Groups are dealt out, each whole: its samples share their prompt's KV. Raises the error
        of an engine that is lost more than `MOST_LOSSES` times, in every process.
        """
        done: dict[str, RequestOutput] = {}
        lost: SlipstreamError | None = None
        for _ in range(MOST_LOSSES + 1):
            self._restore()
            waiting = [request for request in requests if request.rid not in done]
            lost = self._world.from_main(self._run(waiting, done))
            if lost is None:
                break
        if lost is not None:
            raise lost
        outputs = [done[request.rid] for request in requests] if self._engines else []
        for output in outputs:
            raise_if_failed(output)
        return outputs

    @property
    def engines(self) -> Sequence[FleetEngine]:
        """For a caller that feeds them itself, and calls `restore` when one is lost; none but in
        the main process."""
        return self._engines

    def restore(self) -> None:
        """Collective: have every engine serve the version that was pushed last. The weights must be
        those of that push still."""
        self._restore()

    def sleep(self) -> None:
        """Nothing to do: the engines share no memory with the trainer."""

    def push(self, model: Weights, version: int, *, measure_memcpy: bool) -> PushReport:
        """See `Actor`. An engine that dies meanwhile is started again and takes part."""
        self._source = PlainSource(model) if isinstance(model, torch.nn.Module) else model
        started = time.perf_counter()
        report = self._publish(version)
        self._version = version
        return PushReport(
            version=version,
            num_tensors=report.num_tensors,
            num_bytes=report.num_bytes,
            seconds=time.perf_counter() - started,
        )

    def flush(self) -> None:
        """See `Actor`. An engine that is gone has nothing to forget."""
        for engine in self._engines:
            with suppress(EngineDead):
                engine.send(FlushCache())

    def state(self) -> ReplicaState:
        """See `Actor`: the first engine's; in other processes, and while that is gone, as it was
        at the start."""
        with suppress(EngineDead):
            return self._engines[0].state() if self._engines else self._initial
        return self._initial

    def close(self) -> None:
        """See `Actor`."""
        for carrier in (self._sharded, self._single):
            if carrier is not None:
                carrier.close()
        for engine in self._engines:
            engine.close()

    def _run(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> SlipstreamError | None:
        """Deal requests out and run them to their end; the first error by which an engine was
        lost. Its requests are not in `done` then."""
        if not self._engines or not requests:
            return None
        parts = _deal(requests, len(self._engines))
        with ThreadPoolExecutor(len(parts)) as pool:
            futures = [
                pool.submit(engine.generate, part, done)
                for engine, part in zip(self._engines, parts, strict=True)
                if part
            ]
        return next((lost for future in futures if (lost := future.result()) is not None), None)

    def _restore(self) -> None:
        """Collective: have every engine serve the version that was pushed last."""
        behind = [e.place for e in self._engines if not e.serves(self._version)]
        if not self._world.from_main(behind):
            return
        if self._source is None:
            # Nothing was pushed: what the engines load is what they serve.
            self._revive()
            return
        logger.warning("engines %s take version %d again", behind, self._version)
        self._publish(self._version)

    def _revive(self) -> None:
        """Collective: start the engines that died again; every process raises if one fails."""
        failure: SlipstreamError | None = None
        try:
            for engine in self._engines:
                engine.revive()
        except SlipstreamError as error:
            failure = error
        failure = self._world.from_main(failure)
        if failure is not None:
            raise failure

    def _publish(self, version: int) -> UpdateReport:
        """Collective: one update of all engines that do not serve `version`, tried again while
        it is engines that fail."""
        for losses in range(MOST_LOSSES + 1):
            self._revive()
            try:
                return self._publish_once(version)
            except SlipstreamError as error:
                is_loss = self._is_loss(error)
                if losses == MOST_LOSSES or not self._world.from_main(is_loss):
                    raise
                logger.warning("version %d is pushed again: %s", version, error)
        raise AssertionError("the last try returns or raises")

    def _publish_once(self, version: int) -> UpdateReport:
        assert self._source is not None, "publish before the first push"
        begin = BeginUpdate(version=version, manifest=self._source.specs())
        if self._sharded is not None:
            return self._sharded.publish(begin, self._source)
        assert self._single is not None
        return publish(self._single, begin, self._source)

    def _is_loss(self, error: SlipstreamError) -> bool:
        """Whether an update failed because an engine died, not for what it brought."""
        if isinstance(error, EngineDead | FleetDivided):
            return True
        return not all(_lives(engine) for engine in self._engines)


def _lives(engine: FleetEngine) -> bool:
    try:
        engine.state()
    except EngineDead:
        return False
    return True


def _deal(requests: Sequence[Request], num: int) -> list[list[Request]]:
    """Requests in `num` parts, every other group to the next part."""
    parts: list[list[Request]] = [[] for _ in range(num)]
    places: dict[str, int] = {}
    for request in requests:
        place = places.setdefault(request.group or request.rid, len(places) % num)
        parts[place].append(request)
    return parts
