"""The engine as a recipe sees it: requests in, outputs out, new weights pushed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import SlipstreamError, by_name
from engine.protocol import (
    FlushCache,
    MemoryTag,
    ReleaseMemory,
    ReplicaState,
    Request,
    RequestOutput,
    ResumeMemory,
)
from rollout.offline import OnProgress, Progress, generate
from rollout.replica.base import Replica
from trainer_bridge import PushReport, push
from trainer_bridge.adapters.base import WeightSource

WATCH_PERIOD_S = 0.5
BESIDE_WEIGHTS: tuple[MemoryTag, ...] = ("kv_cache", "cuda_graph")

Weights = torch.nn.Module | WeightSource
"""What a trainer publishes: a module of this process, or a source of its tensors."""


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

    def sleep(self) -> None:
        """Nothing is generated until the next `push`: leave the memory to the trainer, where
        the two share it."""
        ...

    def push(self, model: Weights, version: int, *, measure_memcpy: bool) -> PushReport:
        """Publish the model's weights as `version`; all processes of the run call it."""
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
    """An `Actor` over a replica in this process.

    sleeps: release the engine's memory in `sleep`; it was built with `memory.saver` then.
    """

    def __init__(self, replica: Replica, *, sleeps: bool = False) -> None:
        self.replica = replica
        self._sleeps = sleeps
        self._asleep = False
        self._watcher: Watcher | None = None

    def watch(self, watcher: Watcher) -> None:
        """See `Actor`."""
        self._watcher = watcher

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """See `Actor`."""
        outputs = generate(self.replica, requests, on_progress=self._on_progress())
        for output in outputs:
            raise_if_failed(output)
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

    def sleep(self) -> None:
        """See `Actor`."""
        if self._sleeps and not self._asleep:
            self.replica.send(ReleaseMemory())
            self._asleep = True

    def push(self, model: Weights, version: int, *, measure_memcpy: bool) -> PushReport:
        """See `Actor`. Wakes in two parts, so that the KV cache takes its memory only when
        what the update needed is free again."""
        if self._asleep:
            self.replica.send(ResumeMemory(tags=["weights"]))
        is_whole = isinstance(model, torch.nn.Module)
        report = push(model, version, self.replica, measure_memcpy=measure_memcpy and is_whole)
        if self._asleep:
            self.replica.send(ResumeMemory(tags=list(BESIDE_WEIGHTS)))
            self._asleep = False
        return report

    def flush(self) -> None:
        """See `Actor`."""
        self.replica.send(FlushCache())

    def state(self) -> ReplicaState:
        """See `Actor`."""
        return self.replica.state()

    def close(self) -> None:
        """See `Actor`."""
        self.replica.close()


def raise_if_failed(output: RequestOutput) -> None:
    """Raise the error of a request that the engine refused or gave up."""
    finish = output.finish
    assert finish is not None
    if finish.type != "abort":
        return
    message = f"request {output.rid}: {finish.message or 'aborted'}"
    raise by_name(finish.error, message) if finish.error else SlipstreamError(message)
