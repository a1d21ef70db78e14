"""Host time of plan() + apply() per step, without a model.

`python benchmarks/scheduler.py [--json FILE]`. Two workloads:

steady: every request decodes; pages are allocated as they fill, logprobs are returned.
churn: lengths differ, so that requests end, return their outputs and are replaced by new
    groups that share a prompt; this is the mean cost of everything the scheduler does.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import checkout  # noqa: F401
import numpy as np
from machine import processor

from engine.config import SchedulerConfig
from engine.protocol import Request, SamplingParams, StepPlan, StepResult
from rollout.cache.manager import CacheManager
from rollout.scheduler.scheduler import Scheduler

VOCAB = 49152
CONTEXT = 4096
PAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds a step."""

    workload: str
    running: int
    steps: int
    median_ms: float
    p99_ms: float
    mean_ms: float
    plan_median_ms: float
    apply_median_ms: float


def fake_result(plan: StepPlan, rng: np.random.Generator) -> StepResult:
    """Random tokens, none of them a stop token."""
    count = int(plan.samples.sum())
    return StepResult(
        step=plan.step,
        token_ids=rng.integers(10, VOCAB, count, dtype=np.int32),
        logprobs=rng.standard_normal(count, dtype=np.float32),
    )


def requests(
    count: int, prompt_len: int, shortest: int, longest: int, rng: np.random.Generator
) -> Iterator[Request]:
    """Groups of 8 samples of one prompt, all prompts beginning alike."""
    shared = rng.integers(10, VOCAB, prompt_len // 2, dtype=np.int32)
    for index in range(count):
        if index % 8 == 0:
            own = rng.integers(10, VOCAB, prompt_len - len(shared), dtype=np.int32)
            prompt = np.concatenate((shared, own))
        length = int(rng.integers(shortest, longest + 1))
        yield Request(
            rid=f"{index // 8}-{index % 8}",
            prompt_ids=prompt,
            sampling=SamplingParams(max_new_tokens=length),
            seed=index,
            group=str(index // 8),
            stop_ids=[0, 2],
        )


def make_scheduler(running: int) -> Scheduler:
    """Room for `running` sequences and every page they may need."""
    cache = CacheManager(running * (CONTEXT // PAGE_SIZE) // 2, PAGE_SIZE)
    config = SchedulerConfig(max_running=running, max_step_tokens=8192)
    return Scheduler(config, cache, context_length=CONTEXT, vocab_size=VOCAB)


def measure(
    scheduler: Scheduler, steps: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of plan() and of apply() for each of `steps` steps."""
    plan_s, apply_s = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        plan_s[step] = time.perf_counter() - start
        assert plan is not None
        result = fake_result(plan, rng)
        start = time.perf_counter()
        scheduler.apply(result)
        apply_s[step] = time.perf_counter() - start
    return plan_s, apply_s


def summarise(workload: str, running: int, plan_s: np.ndarray, apply_s: np.ndarray) -> Timing:
    """Figures of one workload."""
    total_ms = (plan_s + apply_s) * 1e3
    return Timing(
        workload=workload,
        running=running,
        steps=len(total_ms),
        median_ms=float(np.median(total_ms)),
        p99_ms=float(np.percentile(total_ms, 99)),
        mean_ms=float(total_ms.mean()),
        plan_median_ms=float(np.median(plan_s) * 1e3),
        apply_median_ms=float(np.median(apply_s) * 1e3),
    )


def steady(running: int, steps: int, seed: int = 0) -> Timing:
    """All requests decode throughout."""
    rng = np.random.default_rng(seed)
    scheduler = make_scheduler(running)
    length = min(steps + 64, CONTEXT - 128)
    for request in requests(running, 128, length, length, rng):
        scheduler.add(request)
    while scheduler.stats().num_output_tokens < 3 * running:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.apply(fake_result(plan, rng))
    assert scheduler.stats().num_running == running
    return summarise("steady", running, *measure(scheduler, steps, rng))


def churn(running: int, steps: int, seed: int = 0) -> Timing:
    """A queue that never runs dry behind `running` slots; outputs of 64 to 192 tokens."""
    rng = np.random.default_rng(seed)
    scheduler = make_scheduler(running)
    for request in requests(running * (2 + steps // 64), 128, 64, 192, rng):
        scheduler.add(request)
    measure(scheduler, 100, rng)
    return summarise("churn", running, *measure(scheduler, steps, rng))


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=1024, help="sequences running at once")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    timings = [steady(options.running, options.steps), churn(options.running, options.steps)]
    for timing in timings:
        print(
            f"{timing.workload:7} {timing.running} running: median {timing.median_ms:.3f} ms, "
            f"p99 {timing.p99_ms:.3f} ms, mean {timing.mean_ms:.3f} ms a step "
            f"(median plan {timing.plan_median_ms:.3f}, apply {timing.apply_median_ms:.3f})"
        )
    if options.json:
        record = {
            "processor": processor(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "timings": [asdict(timing) for timing in timings],
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
