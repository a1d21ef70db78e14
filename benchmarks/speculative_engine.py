"""The engines under `benchmarks/speculative.py`: windows of whole batches, and what drafting costs.

A window is a run of decode steps in which the batch stays whole: tokens and time between the first
of its results and the last. B rows, k drafts a row.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch

from engine.config import EngineConfig
from engine.executor import LocalExecutor, build_executor
from engine.protocol import (
    Abort,
    BesideSteps,
    FlushCache,
    Request,
    RequestOutput,
    SamplingParams,
    StepPlan,
    StepResult,
    WeightCommand,
)
from rollout.replica.inline import InlineReplica
from rollout.requests.seeds import derive_seed

WARM_STEPS = 8
PROPOSALS = 20


@dataclass(frozen=True)
class Landed:
    """A step whose result came. at: seconds of the host's clock; rows: of the step."""

    at: float
    rows: int
    tokens: int
    decodes: bool


class RecordingExecutor:
    """An executor that keeps when each result came and what was in it."""

    def __init__(self, inner: LocalExecutor) -> None:
        self.inner = inner
        self.facts = inner.facts
        self.landed: list[Landed] = []
        self.slots = np.zeros(0, np.int32)

    @property
    def worker(self) -> Any:
        return self.inner._worker

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> RecordedStep:
        self.slots = plan.slots
        decodes = bool(plan.query_lens.max() == 1 and plan.samples.all())
        return RecordedStep(self, self.inner.launch(plan), len(plan.slots), decodes)

    def handle(self, command: WeightCommand) -> Any:
        return self.inner.handle(command)

    def start(self, command: BesideSteps) -> Any:
        return self.inner.start(command)

    def cancel(self, reason: str, *, group: str = "") -> None:
        self.inner.cancel(reason, group=group)

    def receive(self, tensors: Iterable[tuple[str, Any]]) -> None:
        self.inner.receive(tensors)

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class RecordedStep:
    """A pending step that reports to its executor."""

    executor: RecordingExecutor
    inner: Any
    rows: int
    decodes: bool

    def result(self) -> StepResult:
        result: StepResult = self.inner.result()
        self.executor.landed.append(
            Landed(time.perf_counter(), self.rows, len(result.token_ids), self.decodes)
        )
        return result


@dataclass(frozen=True)
class Window:
    """Steps of a whole batch. tau: tokens a row a step; captures: graphs captured meanwhile, which
    the time then includes."""

    steps: int
    tokens: int
    seconds: float
    rows: int
    captures: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.steps

    @property
    def tau(self) -> float:
        return self.tokens / (self.steps * self.rows)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """How the requests of a run are drafted for: as `Request` has it."""

    draft_tokens: int = -1
    forced_acceptance: float = -1.0


PLAIN = Draft(draft_tokens=0)


class Bench:
    """One engine and the figures taken on it."""

    def __init__(self, config: EngineConfig) -> None:
        self.executor = RecordingExecutor(build_executor(config))
        self.replica = InlineReplica(config, self.executor)
        self._runs = 0

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        graphs = self.executor.worker._graphs
        return 0 if graphs is None else len(graphs._graphs)

    def requests(
        self,
        prompts: Sequence[np.ndarray],
        draft: Draft,
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float = 1.0,
        seed: int | None = None,
        group: str = "",
    ) -> list[Request]:
        """One request a prompt, that nothing but its length ends. seed: None for one of its own."""
        self._runs += 1
        lens = np.broadcast_to(np.asarray(max_new_tokens), len(prompts))
        return [
            Request(
                rid=f"{self._runs}-{row}",
                group=group or f"{self._runs}-{row}",
                prompt_ids=prompt,
                sampling=SamplingParams(
                    max_new_tokens=int(length), ignore_eos=True, temperature=temperature
                ),
                seed=derive_seed(self._runs if seed is None else seed, row),
                draft_tokens=draft.draft_tokens,
                forced_acceptance=draft.forced_acceptance,
            )
            for row, (prompt, length) in enumerate(zip(prompts, lens, strict=True))
        ]

    def run(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run requests to their end; their outputs in the order of the requests."""
        self.replica.submit(requests)
        found: dict[str, RequestOutput] = {}
        while not self.replica.idle():
            found |= {output.rid: output for output in self.replica.step()}
        return [found[request.rid] for request in requests]

    def window(self, prompts: Sequence[np.ndarray], draft: Draft, output_tokens: int) -> Window:
        """Decode until the rows have `output_tokens` each on average, all of them running."""
        rows, graphs = len(prompts), self.num_graphs
        asked = 2 * output_tokens + 16 * WARM_STEPS
        self.executor.landed.clear()
        self.replica.submit(self.requests(prompts, draft, max_new_tokens=asked))
        steps: list[Landed] = []
        while not self.replica.idle():
            self.replica.step()
            landed = self.executor.landed
            whole = [step for step in landed if step.decodes and step.rows == rows]
            steps = whole[WARM_STEPS:]
            if sum(step.tokens for step in steps[1:]) >= rows * output_tokens:
                break
            assert not whole or landed[-1] is whole[-1], "a row ended within the window"
        captures = self.num_graphs - graphs
        self.abandon()
        tokens = sum(step.tokens for step in steps[1:])
        seconds = steps[-1].at - steps[0].at
        return Window(len(steps) - 1, tokens, seconds, rows, captures)

    def draft_us(self, prompts: Sequence[np.ndarray], k: int) -> float:
        """Microseconds in which the drafter drafts k tokens for each of these rows once they
        decode, with as many other rows to look through as it takes. Its texts are in the cache."""
        self.replica.submit(self.requests(prompts, PLAIN, max_new_tokens=64))
        while not (self.executor.landed and self.executor.landed[-1].decodes):
            self.replica.step()
        try:
            return _time_drafter(self.executor.worker, self.executor.slots, k)
        finally:
            self.abandon()

    def flush(self) -> None:
        """Empty the prefix cache."""
        self.replica.send(FlushCache())

    def abandon(self) -> None:
        """Drop what runs."""
        self.replica.send(Abort(all=True))
        while not self.replica.idle():
            self.replica.step()
        self.executor.landed.clear()

    def close(self) -> None:
        """Free the engine's memory."""
        self.replica.close()
        del self.replica, self.executor
        gc.collect()
        torch.cuda.empty_cache()


def _time_drafter(worker: Any, slots: np.ndarray, k: int) -> float:
    table, drafter = worker._table, worker._drafter
    device, rows = table.device, len(slots)
    sources, forced = drafter._sources.clone(), table.forced.clone()
    slots_R = torch.from_numpy(slots.copy()).to(device)
    lens_R = torch.full((rows,), k, dtype=torch.int32, device=device)
    drafts_RK = torch.zeros((rows, k), dtype=torch.int32, device=device)
    drafted_R = torch.zeros(rows, dtype=torch.int32, device=device)
    others = min(drafter._sources.shape[1], rows - 1)
    for column in range(others):
        drafter._sources[slots_R.long(), column] = slots_R.roll(-1 - column)
    table.forced.fill_(-1.0)

    def propose() -> None:
        drafter.propose(slots_R, lens_R, drafts_RK, drafted_R)

    with torch.inference_mode():
        time_us = _graph_us(propose) if device.type == "cuda" else _host_us(propose)
    drafter._sources.copy_(sources)
    table.forced.copy_(forced)
    return time_us


def _graph_us(call: Any, replays: int = 5) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PROPOSALS):
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / PROPOSALS)
    return min(times)


def _host_us(call: Any) -> float:
    call()
    started = time.perf_counter()
    for _ in range(PROPOSALS):
        call()
    return 1e6 * (time.perf_counter() - started) / PROPOSALS


def random_prompts(vocab_size: int, count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Prompts of distinct random ids, int32 [size] each; the first of more are the same."""
    return [
        np.random.default_rng((seed, row)).integers(0, vocab_size, size, dtype=np.int32)
        for row in range(count)
    ]


def acceptance_for(tau: float, k: int) -> float:
    """The acceptance of a draft with which k drafts give tau tokens a verify on average:
    1 + p + ... + p^k = tau."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tau(middle, k) < tau else (low, middle)
    return low


def expected_tau(acceptance: float, k: int) -> float:
    """Tokens a verify of k drafts."""
    return float(sum(acceptance**j for j in range(k + 1)))
