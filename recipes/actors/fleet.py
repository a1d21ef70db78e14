"""Engines in processes of their own, here or elsewhere, which all trainer processes publish to.

An engine that is lost comes back or is left out, takes the version that the others serve, and the
requests that were lost with it are asked again: nothing is lost but time. Their tokens are the
same, since they depend on a request's seed and not on the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar, cast

import torch
from msgspec.structs import replace

from engine.errors import EngineDead, SlipstreamError, UpdateOrder
from engine.protocol import (
    BeginUpdate,
    ReplicaState,
    Request,
    RequestOutput,
    UpdateReport,
    VersionSpan,
)
from recipes.actors.actor import Watcher, Weights, raise_if_failed
from recipes.actors.engines import Engines
from recipes.actors.fleet_engine import FleetEngine
from recipes.world import World
from trainer_bridge import PushReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.transports.base import publish
from trainer_bridge.transports.nccl import NcclCarrier
from trainer_bridge.transports.sharded import ShardedCarrier

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_LOSSES = 3
"""Engines lost in one call of `generate` or `push`, before it gives up."""


class FleetActor:
    """An `Actor` whose engines the main process speaks with; the others only send weights.

    engines: None but in the main process. device: where the trainer's tensors are. address: at
    which the engines reach this process. group: what they call the group that brings weights.
    Every trainer process broadcasts the shards that it holds, one alone all tensors.
    """

    def __init__(
        self,
        engines: Engines | None,
        world: World,
        *,
        device: torch.device,
        address: str = "127.0.0.1",
        group: str = "slipstream",
    ) -> None:
        """Collective."""
        self._world = world
        self._engines = engines
        found = world.from_main(None if engines is None else (engines.state(), engines.base))
        assert found is not None, "the main process has an engine"
        self._initial, self._base = found
        self._version = max(self._initial.version - self._base, 0)
        self._source: WeightSource | None = None
        targets = () if engines is None else engines.targets
        self._sharded: ShardedCarrier | None = None
        self._single: NcclCarrier | None = None
        if world.size > 1:
            self._sharded = ShardedCarrier(targets, device=device, address=address, name=group)
        else:
            self._single = NcclCarrier(targets, device=device, address=address, name=group)

    def watch(self, watcher: Watcher) -> None:
        """Several engines at once are not watched."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """See `Actor`; collective, since an engine that comes back needs the weights of
        all trainer processes: they must be those of the last `push` still.

        Raises the error of an engine that is lost more than `MOST_LOSSES` times, in every process.
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
        """Those that are replicas of the run's own, for a caller that feeds them itself, and calls
        `restore` when one is lost; none but in the main process."""
        targets = () if self._engines is None else self._engines.targets
        return [engine for engine in targets if isinstance(engine, FleetEngine)]

    def restore(self) -> None:
        """Collective: have every engine serve the version that was pushed last. The weights must be
        those of that push still."""
        self._restore()

    def sleep(self) -> None:
        """Nothing to do: the engines share no memory with the trainer."""

    def push(self, model: Weights, version: int, *, measure_memcpy: bool) -> PushReport:
        """See `Actor`. An engine that is lost meanwhile and comes back takes part."""
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
        """See `Actor`."""
        if self._engines is not None:
            self._engines.flush()

    def state(self) -> ReplicaState:
        """See `Actor`: the first engine's; in other processes, and while that is gone, as it was
        at the start."""
        found = self._initial
        with suppress(EngineDead):
            found = found if self._engines is None else self._engines.state()
        return replace(found, version=max(found.version - self._base, 0))

    def close(self) -> None:
        """See `Actor`."""
        for carrier in (self._sharded, self._single):
            if carrier is not None:
                carrier.close()
        if self._engines is not None:
            self._engines.close()

    def _run(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> SlipstreamError | None:
        """Run requests to their end; the first error by which an engine was lost. Its requests
        are not in `done` then."""
        if self._engines is None or not requests:
            return None
        found: dict[str, RequestOutput] = {}
        oldest = self._version
        lost = self._engines.generate(requests, found)
        for rid, output in found.items():
            try:
                done[rid] = self._counted(output, oldest)
            except SlipstreamError as error:
                lost = lost or error
        return lost

    def _counted(self, output: RequestOutput, oldest: int) -> RequestOutput:
        """The output with versions as the run counts them. Raises EngineDead for tokens of weights
        before `oldest`, which an engine has that was started again, and UpdateOrder for those of
        weights that this run did not publish."""
        spans = [self._span(span) for span in output.spans]
        for span in spans:
            if span.version < oldest:
                raise EngineDead(
                    f"an engine sampled with weights that were replaced: {span.version} in place "
                    f"of {oldest}",
                    field="engine",
                )
            if span.version > self._version:
                raise another_trainer(span.version + self._base)
        kv_spans = [self._span(span) for span in output.kv_spans]
        return replace(output, spans=spans, kv_spans=kv_spans) if self._base else output

    def _span(self, span: VersionSpan) -> VersionSpan:
        return VersionSpan(span.version - self._base, span.start, span.end)

    def _restore(self) -> None:
        """Collective: have every engine serve the version that was pushed last."""
        behind = self._on_main(lambda engines: engines.behind(self._base + self._version))
        if not behind:
            return
        if self._source is None:
            # Nothing was pushed: what the engines load is what they serve.
            self._on_main(lambda engines: engines.revive())
            return
        logger.warning("engines %s take version %d again", behind, self._version)
        self._publish(self._version)

    def _on_main(self, act: Callable[[Engines], T]) -> T:
        """Collective: what the main process makes of its engines; every process raises if it
        fails."""
        result: T | None = None
        failure: SlipstreamError | None = None
        if self._engines is not None:
            try:
                result = act(self._engines)
            except SlipstreamError as error:
                failure = error
        result, failure = self._world.from_main((result, failure))
        if failure is not None:
            raise failure
        return cast(T, result)

    def _publish(self, version: int) -> UpdateReport:
        """Collective: one update of all engines that do not serve `version`, tried again while
        it is engines that fail."""
        for losses in range(MOST_LOSSES + 1):
            self._on_main(lambda engines: engines.revive())
            try:
                return self._publish_once(self._base + version)
            except SlipstreamError as error:
                is_loss = self._is_loss(error)
                if losses == MOST_LOSSES or not is_loss:
                    raise
                logger.warning("version %d is pushed again: %s", version, error)
        raise AssertionError("the last try returns or raises")

    def _is_loss(self, error: SlipstreamError) -> bool:
        """Collective: whether an update failed for an engine that was lost."""
        return self._on_main(lambda engines: engines.is_loss(error))

    def _publish_once(self, version: int) -> UpdateReport:
        assert self._source is not None, "publish before the first push"
        begin = BeginUpdate(version=version, manifest=self._source.specs())
        if self._sharded is not None:
            return self._sharded.publish(begin, self._source)
        assert self._single is not None
        return publish(self._single, begin, self._source)


def another_trainer(version: int) -> UpdateOrder:
    """The error for engines that serve what this run has not published."""
    return UpdateOrder(
        f"endpoint: version {version} is served there, which this run did not publish: another "
        "trainer publishes to the same engines; give each run its own",
        field="endpoint",
    )
