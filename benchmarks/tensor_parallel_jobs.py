"""One measurement of `benchmarks/tensor_parallel.py` or `data_parallel.py`, in a process of its
own.

`python benchmarks/tensor_parallel_jobs.py JOB OUT` takes a `Job` as JSON and writes its figures.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
from gpu_rollout_workloads import make_workload

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from engine.parallel.connect import connect
from engine.parallel.mesh import Mesh
from engine.protocol import FlushCache, Request, RequestOutput, SamplingParams
from rollout.launch import launch
from rollout.replica.base import Replica

FAULT_S, PATIENT_S = 20.0, 120.0
"""Deadlines of a collective: where ranks are lost, and where kernels are still compiled."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement, in its own process. times: how often the workload comes, with other prompts.
    shorten: divisor of its lengths."""

    part: str
    model: str
    tp: int
    device: str
    dp: int = 1
    times: int = 1
    shorten: int = 1
    dtype: str = "bfloat16"
    name: str = ""
    rank: int = 0
    meeting_place: str = ""


def config_of(job: Job, max_running: int = 64, context: int = 2048) -> EngineConfig:
    timeout_s = FAULT_S if job.part == "faults" else PATIENT_S
    on_cpu = job.device == "cpu"
    return EngineConfig(
        model=job.model,
        load_format="random",
        device="cpu" if on_cpu else "cuda",
        dtype=job.dtype,
        context_length=256 if on_cpu else context,
        cache=CacheConfig(memory_bytes=(64 << 20) if on_cpu else None),
        scheduler=SchedulerConfig(max_running=max_running),
        parallel=ParallelConfig(tp_size=job.tp, dp_size=job.dp, timeout_s=timeout_s),
    )


def finish(replica: Replica) -> dict[str, RequestOutput]:
    """Step until idle; final outputs by id."""
    finals = {}
    while not replica.idle():
        finals |= {o.rid: o for o in replica.step() if o.finish is not None}
    return finals


def greedy(count: int, prompt_tokens: int, new_tokens: int) -> list[Request]:
    rng = np.random.default_rng(7)
    params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
    return [
        Request(
            rid=str(row),
            prompt_ids=rng.integers(3, 32000, prompt_tokens, dtype=np.int32),
            sampling=params,
            seed=row,
            prompt_logprob_start=0 if row == 0 else -1,
        )
        for row in range(count)
    ]


def agreement(job: Job) -> dict[str, Any]:
    """Greedy tokens of 16 rows, and the prompt logprobs of one of them."""
    rows, new = (4, 8) if job.device == "cpu" else (16, 128)
    with launch(config_of(job)) as replica:
        replica.submit(greedy(rows, 96, new))
        outputs = finish(replica)
    scored = outputs["0"].prompt_logprobs
    assert scored is not None
    return {
        "tokens": [outputs[str(row)].token_ids.tolist() for row in range(rows)],
        "logprobs": [outputs[str(row)].logprobs.tolist() for row in range(rows)],
        "prompt": scored.tolist(),
    }


def faults(job: Job) -> dict[str, Any]:
    """Seconds from the fault to the error, and the error."""
    with launch(config_of(job)) as replica:
        replica.submit(greedy(8, 32, 100 if job.device == "cpu" else 1500))
        for _ in range(20):
            replica.step()
        pid = replica._leader._executor._ranks[0]._process.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL if job.name == "killed" else signal.SIGSTOP)
        started = time.perf_counter()
        finals = finish(replica)
        seconds = time.perf_counter() - started
        end = finals["1"].finish
        assert end is not None
        closing = time.perf_counter()
    return {
        "error": end.error,
        "message": (end.message or "").splitlines()[:1],
        "seconds": seconds,
        "close_s": time.perf_counter() - closing,
    }


def collectives(job: Job) -> dict[str, Any]:
    """Microseconds of one all-reduce of [rows, 4096] bf16 within a captured graph."""
    device = torch.device("cuda", job.rank)
    torch.cuda.set_device(device)
    mesh = Mesh(tp_rank=job.rank, tp_size=job.tp)
    group = connect(mesh, device, meeting_place=job.meeting_place, timeout_s=PATIENT_S)
    figures: dict[str, Any] = {}
    for rows in (1, 8, 64, 256, 1024):
        x = torch.full((rows, 4096), float(job.rank + 1), dtype=torch.bfloat16, device=device)
        total = group.all_reduce(x.clone())
        assert bool((total == job.tp * (job.tp + 1) / 2).all()), "a wrong sum"
        figures[str(rows)] = graph_us(lambda x=x: group.all_reduce(x.zero_()))
        figures[f"{rows} without"] = graph_us(lambda x=x: x.zero_())
    group.minimum(0)
    group.close()
    return figures


def graph_us(run: Any, repeats: int = 100) -> float:
    """Microseconds of `run` captured `repeats` times in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(repeats):
            run()
        graph.capture_end()
        for _ in range(3):
            graph.replay()
        stream.synchronize()
        started = time.perf_counter()
        for _ in range(5):
            graph.replay()
        stream.synchronize()
    return (time.perf_counter() - started) / 5 / repeats * 1e6


def speed(job: Job) -> dict[str, Any]:
    """Tokens a second, and the median time between steps that only decode."""
    work = make_workload(job.name)
    shorten = 64 if job.device == "cpu" else job.shorten
    config = config_of(job, max_running=len(work.output_lens), context=4096)
    if job.device == "cpu":
        num_rows = min(work.samples, 2)
        lens = np.full(1, 32)
        work = replace(
            work, samples=num_rows, prompt_lens=lens, output_lens=work.output_lens[:num_rows]
        )
    with launch(config) as replica:
        vocab = replica.state().vocab_size
        for seed in range(100, 100 + job.times):
            replica.submit(work.requests(vocab, seed=seed, shorten=16 * shorten))
        finish(replica)
        replica.send(FlushCache())
        requests = [
            request
            for seed in range(2, 2 + job.times)
            for request in work.requests(vocab, seed=seed, shorten=shorten)
        ]
        replica.submit(requests)
        started = time.perf_counter()
        walls = []
        while not replica.idle():
            before = time.perf_counter()
            replica.step()
            walls.append(time.perf_counter() - before)
        seconds = time.perf_counter() - started
        num_tokens = sum(request.sampling.max_new_tokens for request in requests)
        pages = replica.state().total_pages
    return {
        "tokens_per_s": num_tokens / seconds,
        "seconds": seconds,
        "step_ms": 1e3 * float(np.median(walls)),
        "pages": pages,
    }


PARTS = {
    "agreement": agreement,
    "faults": faults,
    "collectives": collectives,
    "speed": speed,
}


def main(job_text: str, out: str) -> int:
    """Take one measurement; rank 0 writes it."""
    job = Job(**json.loads(job_text))
    figures = PARTS[job.part](job)
    if job.rank == 0:
        Path(out).write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
