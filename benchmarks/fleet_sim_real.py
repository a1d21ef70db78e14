"""Two replicas behind the router, for `benchmarks/fleet_sim.py`: what their steps cost, and a load.

fit: one replica, by itself, with a few shapes of batches; a least squares fit of `Costs`. load: the
same requests that the simulator gets, at the times at which they arrive, through the router.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import checkout
import httpx
import numpy as np
from fleet_sim_costs import not_negative
from fleet_sim_replica import Costs, Job

from tests.helpers.router_process import router_process, wait_for
from tests.helpers.serve_process import ServerProcess

Engine = Literal["stepping", "model"]
SMOLLM2 = checkout.ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_ROWS, _KV_TOKENS = 64, 65_536
_SHAPES = (
    (1, 16, 48),
    (8, 16, 48),
    (8, 256, 48),
    (24, 16, 48),
    (1, 384, 2),
    (1, 768, 2),
    (4, 384, 48),
)
"""Rows, tokens of each one's prompt, tokens of its reply."""

_STEPPING = f"""
import logging
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from rollout.http import server
from rollout.http.config import ServeConfig
logging.basicConfig(level=logging.INFO)
server.find_tokenizer = lambda model: None
engine = EngineConfig(
    model="fake",
    context_length=4096,
    cache=CacheConfig(page_size=16, num_pages={_KV_TOKENS // 16}),
    scheduler=SchedulerConfig(max_running={_MAX_ROWS}),
)
config = ServeConfig(engine=engine, port=0, router=ROUTER)
server.serve(config, factory="benchmarks.fleet_sim_engine:build")
"""


@dataclass(frozen=True)
class Real:
    """A router, and the replicas behind it."""

    router: str
    replicas: tuple[str, ...]


@contextmanager
def replicas(engine: Engine, policy: str) -> Iterator[Real]:
    """Two of them, and a router of that policy."""
    with ExitStack() as stack:
        router = stack.enter_context(router_process(f"policy={policy!r}"))
        for _ in range(2):
            stack.enter_context(ServerProcess(_server(engine, router.url)))
        wait_for(router.url, 2)
        listed = httpx.get(f"{router.url}/list_workers", trust_env=False).json()["urls"]
        yield Real(router.url, tuple(listed))


def _server(engine: Engine, router: str) -> list[str]:
    if engine == "stepping":
        return ["-c", _STEPPING.replace("ROUTER", repr(router))]
    words = ["-m", "rollout", "serve", "--model", str(SMOLLM2), "--port", "0", "--router", router]
    words += ["--context-length", "2048", "--kv-memory", "2"]
    return [*words, "--max-running", str(_MAX_ROWS)]


Batch = tuple[list[float], float]
"""What a batch had of steps, rows, tokens read, of prompts, and replies; and its seconds."""


def batches(url: str, turn: int) -> list[Batch]:
    """What one replica takes for each shape. turn: of these measurements, so that no prompt is
    one that it has."""
    found: list[Batch] = []
    for number, (count, prompt, out) in enumerate(_SHAPES):
        names = range((turn * len(_SHAPES) + number) * 100, 1_000_000)
        jobs = [_job(name, prompt, out) for name in names[:count]]
        took = _batch(url, jobs)
        # A token comes a step, the first one with the end of the prompt.
        read = out * count * (prompt + out / 2)
        found.append(([out, out * count, read, count * prompt, 1.0], took))
    return found


def fit(measured: Sequence[Batch]) -> Costs:
    """The costs of a replica, from the median seconds of each shape of batch."""
    rows = np.array([row for row, _ in measured[: len(_SHAPES)]])
    seconds = np.array([took for _, took in measured]).reshape(-1, len(_SHAPES))
    found = not_negative(rows, np.median(seconds, axis=0))
    step, row, kv, prefill, reply = (float(value) for value in found)
    return Costs(
        step_s=step,
        row_s=row,
        kv_s=kv,
        prefill_s=prefill,
        reply_s=reply,
        max_rows=_MAX_ROWS,
        kv_tokens=_KV_TOKENS,
    )


def load(url: str, jobs: Sequence[Job]) -> dict[str, float]:
    """Seconds until all have ended, and that each took in the mean."""
    return asyncio.run(_load(url, jobs))


async def _load(url: str, jobs: Sequence[Job]) -> dict[str, float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=300.0, limits=limits, trust_env=False
    ) as http:
        start = time.perf_counter()

        async def one(job: Job) -> tuple[float, float]:
            await asyncio.sleep(max(start + job.arrives - time.perf_counter(), 0.0))
            sent = time.perf_counter()
            await _ask(http, job)
            end = time.perf_counter()
            return end - sent, end - start

        took = await asyncio.gather(*(one(job) for job in jobs))
    latencies = [latency for latency, _ in took]
    return {
        "makespan_s": max(end for _, end in took),
        "mean_s": statistics.fmean(latencies),
        "p50_s": statistics.median(latencies),
    }


def _batch(url: str, jobs: Sequence[Job]) -> float:
    """Seconds of jobs that come in one request, so that all enter one step."""
    body = {
        "input_ids": [list(job.prompt) for job in jobs],
        "sampling_params": {"max_new_tokens": jobs[0].num_out, "ignore_eos": True},
    }
    start = time.perf_counter()
    reply = httpx.post(f"{url}/generate", json=body, timeout=300.0, trust_env=False)
    took = time.perf_counter() - start
    assert len(reply.json()) == len(jobs), reply.text
    return took


async def _ask(http: httpx.AsyncClient, job: Job) -> None:
    body: dict[str, Any] = {
        "input_ids": list(job.prompt[:: len(job.prompt) // job.prompt_tokens]),
        "sampling_params": {"max_new_tokens": job.num_out, "ignore_eos": True},
    }
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["output_ids"]) == job.num_out


def _job(number: int, prompt_tokens: int, num_out: int) -> Job:
    """A request whose prompt nobody has: its ids are digits of its number."""
    digits = f"{number:06}".encode()
    prompt = (digits * (prompt_tokens // 6 + 1))[:prompt_tokens]
    return Job(number, prompt, prompt_tokens, num_out, ((number, prompt_tokens),), 0.0)


if __name__ == "__main__":
    sys.exit("this is a part of benchmarks/fleet_sim.py")
