"""The engine as a recipe sees it: requests in, outputs out, new weights pushed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from engine.config import CacheConfig, EngineConfig
from engine.errors import SlipstreamError, by_name
from engine.protocol import FlushCache, ReplicaState, Request, RequestOutput
from recipes.options import Options
from rollout.launch import launch
from rollout.offline import generate
from rollout.replica import Replica
from trainer_bridge import PushReport, push


class Actor(Protocol):
    """What the loop needs of an engine."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run requests to their end; outputs in the order asked. Raises the typed error of
        a request that the engine refused or gave up."""
        ...

    def push(self, model: torch.nn.Module, version: int, *, measure_memcpy: bool) -> PushReport:
        """Publish the model's weights as `version`."""
        ...

    def flush(self) -> None:
        """Forget cached prefixes, so that what follows does not depend on what came before."""
        ...

    def state(self) -> ReplicaState:
        """What the engine is and serves."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


class InlineActor:
    """An `Actor` over a replica in this process."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """See `Actor`."""
        outputs = generate(self.replica, requests)
        for output in outputs:
            _raise_if_failed(output)
        return outputs

    def push(self, model: torch.nn.Module, version: int, *, measure_memcpy: bool) -> PushReport:
        """See `Actor`."""
        return push(model, version, self.replica, measure_memcpy=measure_memcpy)

    def flush(self) -> None:
        """See `Actor`."""
        self.replica.send(FlushCache())

    def state(self) -> ReplicaState:
        """See `Actor`."""
        return self.replica.state()

    def close(self) -> None:
        """See `Actor`."""
        self.replica.close()


def launch_actor(options: Options) -> InlineActor:
    """Start an engine in this process with the model of the options."""
    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        cache=CacheConfig(memory_bytes=int(options.rollout.kv_memory_gb * 2**30)),
    )
    return InlineActor(launch(config))


def _raise_if_failed(output: RequestOutput) -> None:
    finish = output.finish
    assert finish is not None
    if finish.type != "abort":
        return
    message = f"request {output.rid}: {finish.message or 'aborted'}"
    raise by_name(finish.error, message) if finish.error else SlipstreamError(message)
