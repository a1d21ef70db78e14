"""Engines in processes of their own, which all trainer processes publish to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from engine.protocol import BeginUpdate, FlushCache, ReplicaState, Request, RequestOutput
from recipes.actor import Watcher, Weights, raise_if_failed
from recipes.world import World
from rollout.offline import generate
from rollout.replica import Replica
from trainer_bridge import PushReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.transports.base import publish
from trainer_bridge.transports.nccl import NcclCarrier
from trainer_bridge.transports.sharded import ShardedCarrier


class FleetActor:
    """An `Actor` whose engines the main process speaks with; the others only send weights.

    replicas: empty but in the main process. device: where the trainer's tensors are.
    Every trainer process broadcasts the shards that it holds, one alone all tensors.
    """

    def __init__(self, replicas: Sequence[Replica], world: World, *, device: torch.device) -> None:
        """Collective."""
        self._replicas = replicas
        initial = world.from_main(replicas[0].state() if replicas else None)
        assert initial is not None, "the main process has an engine"
        self._initial: ReplicaState = initial
        self._sharded: ShardedCarrier | None = None
        self._single: NcclCarrier | None = None
        if world.size > 1:
            self._sharded = ShardedCarrier(replicas, device=device)
        else:
            self._single = NcclCarrier(replicas, device=device)

    def watch(self, watcher: Watcher) -> None:
        """Several engines at once are not watched."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """See `Actor`. Groups are dealt out, each whole: its samples share their prompt's KV."""
        parts = _deal(requests, max(len(self._replicas), 1))
        with ThreadPoolExecutor(len(parts)) as pool:
            futures = [
                pool.submit(generate, replica, part)
                for replica, part in zip(self._replicas, parts, strict=False)
                if part
            ]
        by_rid = {output.rid: output for future in futures for output in future.result()}
        outputs = [by_rid[request.rid] for request in requests]
        for output in outputs:
            raise_if_failed(output)
        return outputs

    def sleep(self) -> None:
        """Nothing to do: the engines share no memory with the trainer."""

    def push(self, model: Weights, version: int, *, measure_memcpy: bool) -> PushReport:
        """See `Actor`."""
        source: WeightSource = PlainSource(model) if isinstance(model, torch.nn.Module) else model
        started = time.perf_counter()
        begin = BeginUpdate(version=version, manifest=source.specs())
        if self._sharded is not None:
            report = self._sharded.publish(begin, source)
        else:
            assert self._single is not None
            report = publish(self._single, begin, source)
        return PushReport(
            version=version,
            num_tensors=report.num_tensors,
            num_bytes=report.num_bytes,
            seconds=time.perf_counter() - started,
        )

    def flush(self) -> None:
        """See `Actor`."""
        for replica in self._replicas:
            replica.send(FlushCache())

    def state(self) -> ReplicaState:
        """See `Actor`: the first engine's, in other processes as it was at the start."""
        return self._replicas[0].state() if self._replicas else self._initial

    def close(self) -> None:
        """See `Actor`."""
        for carrier in (self._sharded, self._single):
            if carrier is not None:
                carrier.close()
        for replica in self._replicas:
            replica.close()


def _deal(requests: Sequence[Request], num: int) -> list[list[Request]]:
    """Requests in `num` parts, every other group to the next part."""
    parts: list[list[Request]] = [[] for _ in range(num)]
    places: dict[str, int] = {}
    for request in requests:
        place = places.setdefault(request.group or request.rid, len(places) % num)
        parts[place].append(request)
    return parts
