"""Host time to end 1,024 running requests, and of a weight update's treatment of them.

`python benchmarks/abort.py [--running N] [--json FILE]`, without a model. Every request decodes
with a KV of a few hundred tokens when the command comes; groups of 8 share their prompt.

abort: `Abort(all=True)`, outputs built. pause_abort, pause_retract: the pause modes. keep,
recompute, fresh: the commit of a version, by the requests' kv_policy. Wall time, and processor
time, which is what a machine with other work is to be judged by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import checkout  # noqa: F401
import msgspec
import numpy as np
from machine import processor
from scheduler import fake_result, make_scheduler, requests

from engine.protocol import KvPolicy
from rollout.scheduler.scheduler import Scheduler

CASES: dict[str, tuple[KvPolicy, Callable[[Scheduler], object]]] = {
    "abort": ("keep", lambda scheduler: scheduler.abort(all=True)),
    "pause_abort": ("keep", lambda scheduler: scheduler.pause("abort")),
    "pause_retract": ("keep", lambda scheduler: scheduler.pause("retract")),
    "keep": ("keep", lambda scheduler: scheduler.set_version(1)),
    "recompute": ("recompute", lambda scheduler: scheduler.set_version(1)),
    "fresh": ("fresh", lambda scheduler: scheduler.set_version(1)),
}


def busy_scheduler(running: int, num_tokens: int, policy: KvPolicy) -> Scheduler:
    """A scheduler whose slots are full of requests with `num_tokens` outputs each."""
    rng = np.random.default_rng(0)
    scheduler = make_scheduler(running)
    for request in requests(running, 128, num_tokens + 64, num_tokens + 64, rng):
        scheduler.add(msgspec.structs.replace(request, kv_policy=policy))
    while scheduler.stats().num_output_tokens < num_tokens * running:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.apply(fake_result(plan, rng))
    assert scheduler.stats().num_running == running
    return scheduler


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one command."""

    wall_ms: float
    cpu_ms: float


def measure(case: str, running: int, num_tokens: int, repeats: int) -> Timing:
    """Time one command on `repeats` schedulers."""
    policy, command = CASES[case]
    wall, cpu = [], []
    for _ in range(repeats):
        scheduler = busy_scheduler(running, num_tokens, policy)
        started, cpu_started = time.perf_counter(), time.process_time()
        command(scheduler)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
        scheduler.check_integrity()
    return Timing(float(np.median(wall)) * 1e3, float(np.median(cpu)) * 1e3)


def main() -> None:
    """Measure every case, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=1024, help="sequences running at once")
    parser.add_argument("--tokens", type=int, default=200, help="output tokens each has")
    parser.add_argument("--repeats", type=int, default=3, help="commands timed a case")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures = {
        case: measure(case, options.running, options.tokens, options.repeats) for case in CASES
    }
    for case, timing in figures.items():
        print(
            f"{case:14} {options.running} running: {timing.wall_ms:8.2f} ms "
            f"({timing.cpu_ms:.2f} ms of processor time)"
        )
    if options.json:
        timings = {case: asdict(timing) for case, timing in figures.items()}
        record = {"processor": processor(), "running": options.running, "timings": timings}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
