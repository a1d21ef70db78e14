"""The engine under `benchmarks/gpu_rollout.py`, with clocks around its steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_rollout_profile import StepProfile, profile_steps
from gpu_rollout_workloads import Workload

from engine.config import EngineConfig
from engine.executor import LocalExecutor, build_executor
from engine.protocol import (
    Abort,
    BesideSteps,
    FlushCache,
    Request,
    RequestOutput,
    StepMasks,
    StepPlan,
    StepResult,
    WeightCommand,
)
from rollout.replica.inline import InlineReplica


class TimedExecutor:
    """An executor that adds up how long its callers wait for results."""

    def __init__(self, inner: LocalExecutor) -> None:
        self.inner = inner
        self.facts = inner.facts
        self.waited_s = 0.0
        self.decode_only = False
        self.num_rows = 0

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> TimedStep:
        self.decode_only = bool(plan.query_lens.max(initial=0) == 1)
        self.num_rows = len(plan.slots)
        return TimedStep(self, self.inner.launch(plan))

    def mask(self, masks: StepMasks) -> None:
        self.inner.mask(masks)

    def handle(self, command: WeightCommand) -> Any:
        return self.inner.handle(command)

    def start(self, command: BesideSteps) -> Any:
        return self.inner.start(command)

    def cancel(self, reason: str, *, group: str = "") -> None:
        self.inner.cancel(reason, group=group)

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        self.inner.receive(tensors, lasting=lasting)

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class TimedStep:
    """A pending step whose wait is counted."""

    executor: TimedExecutor
    inner: Any

    def result(self) -> StepResult:
        started = time.perf_counter()
        result: StepResult = self.inner.result()
        self.executor.waited_s += time.perf_counter() - started
        return result


class Bench:
    """One engine and the figures taken on it."""

    def __init__(self, config: EngineConfig, shorten: int = 1) -> None:
        self.executor = TimedExecutor(build_executor(config))
        self.replica = InlineReplica(config, self.executor)
        self._shorten = shorten
        self._seed = 0

    def requests(self, work: Workload, shorten: int = 1) -> list[Request]:
        """The workload with prompts that no earlier call had."""
        self._seed += 1
        vocab_size = self.executor.facts.vocab_size
        return work.requests(vocab_size, seed=self._seed, shorten=shorten)

    def submit(self, requests: list[Request]) -> int:
        """Queue requests on an empty prefix cache; returns their output tokens."""
        self.replica.send(FlushCache())
        self.replica.submit(requests)
        return sum(request.sampling.max_new_tokens for request in requests)

    def finish(self) -> list[RequestOutput]:
        """Step until nothing is left; the outputs that came."""
        outputs: list[RequestOutput] = []
        while not self.replica.idle():
            outputs += self.replica.step()
        return outputs

    def warm_up(self, work: Workload) -> None:
        """Run the workload with short outputs."""
        self.submit(self.requests(work, shorten=16 * self._shorten))
        self.finish()

    def measure(self, work: Workload) -> dict[str, float]:
        """Warm up, then run the workload once, timing every decode step."""
        self.warm_up(work)
        num_tokens = self.submit(self.requests(work, self._shorten))
        walls, hosts = [], []
        started = time.perf_counter()
        while not self.replica.idle():
            waited, before = self.executor.waited_s, time.perf_counter()
            self.replica.step()
            wall = time.perf_counter() - before
            if self.executor.decode_only:
                walls.append(wall)
                hosts.append(wall - (self.executor.waited_s - waited))
        seconds = time.perf_counter() - started
        return {
            "tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_s": num_tokens / seconds,
            "decode_steps": len(walls),
            "decode_seconds": sum(walls),
            "step_ms": 1e3 * statistics.median(walls),
            "host_ms": 1e3 * statistics.median(hosts),
        }

    def profile(self, work: Workload, after: int = 40, count: int = 10) -> StepProfile:
        """Kernel times of `count` decode steps, the first `after` some time into the run."""
        self.submit(self.requests(work))
        steps = 0
        while steps < after:
            self.replica.step()
            steps += self.executor.decode_only
        profile = profile_steps(self.replica.step, count)
        self.abandon()
        return profile

    def abandon(self) -> None:
        """Drop what runs."""
        self.replica.send(Abort(all=True))
        self.finish()

    def close(self) -> None:
        """Free the GPU for another process."""
        self.replica.close()
        del self.replica, self.executor
        gc.collect()
        torch.cuda.empty_cache()
