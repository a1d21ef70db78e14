"""The engine as a recipe sees it: requests in, outputs out, new weights pushed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import CacheConfig, EngineConfig
from engine.errors import SlipstreamError, by_name
from engine.protocol import FlushCache, ReplicaState, Request, RequestOutput
from recipes.options import Options
from rollout.launch import launch
from rollout.offline import OnProgress, Progress, generate
from rollout.replica import Replica
from trainer_bridge import PushReport, push

WATCH_PERIOD_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How far a call of `generate` is. kv_use: share of KV pages held by running sequences."""

    num_done: int
    num_requests: int
    tokens_per_s: float
    kv_use: float


Watcher = Callable[[Generation], None]


class Actor(Protocol):
    """What the loop needs of an engine."""

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` how each later `generate` goes, about twice a second."""
        ...

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
        self._watcher: Watcher | None = None

    def watch(self, watcher: Watcher) -> None:
        """See `Actor`."""
        self._watcher = watcher

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """See `Actor`."""
        outputs = generate(self.replica, requests, on_progress=self._on_progress())
        for output in outputs:
            _raise_if_failed(output)
        return outputs

    def _on_progress(self) -> OnProgress | None:
        """What `generate` calls after every step: passes it on to the watcher now and then."""
        watcher = self._watcher
        if watcher is None:
            return None
        started = shown = time.perf_counter()
        before = self.replica.state().num_output_tokens

        def on_progress(progress: Progress) -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - shown < WATCH_PERIOD_S and progress.num_done < progress.num_requests:
                return
            shown, state = now, self.replica.state()
            held = state.total_pages - state.free_pages - state.cached_pages
            watcher(
                Generation(
                    num_done=progress.num_done,
                    num_requests=progress.num_requests,
                    tokens_per_s=(state.num_output_tokens - before) / (now - started),
                    kv_use=max(0, held) / state.total_pages,
                )
            )

        return on_progress

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
