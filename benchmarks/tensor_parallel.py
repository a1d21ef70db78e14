"""Tensor parallelism on GPUs: agreement with one rank, faults, then decode speed.

    python benchmarks/tensor_parallel.py --model shapes/qwen3-8b.json --tp 1 2 4

Every measurement is a process of its own with a deadline, so that one that hangs or fails is
reported and the next is taken. Agreement: greedy tokens and prompt logprobs of a small random
model, with decode graphs, TP n against TP 1, in float32 and bfloat16. Faults: a rank is killed,
or stopped, in the middle of graph replays, and the replica must end with an error that names it.
Collectives: one all-reduce of a decode step's hidden states, captured 100 times in a graph.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gpu_rollout_workloads import make_workload
from machine import describe

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from engine.parallel.connect import connect
from engine.parallel.mesh import Mesh
from engine.protocol import FlushCache, Request, RequestOutput, SamplingParams
from rollout.launch import launch
from rollout.replica.base import Replica

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32003,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAULT_S, PATIENT_S = 20.0, 120.0
"""Deadlines of a collective: where ranks are lost, and where kernels are still compiled."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json, for the speed."""
    tp: tuple[int, ...] = (1, 2)
    """Tensor-parallel sizes; the others are compared with the first."""
    parts: tuple[Literal["agreement", "faults", "collectives", "speed"], ...] = (
        "agreement",
        "faults",
        "collectives",
        "speed",
    )
    """What to do, in order."""
    workloads: tuple[Literal["group", "group8", "single"], ...] = ("single", "group8")
    """Workloads of the speed."""
    deadline_s: float = 240.0
    """Of one measurement."""
    device: Literal["auto", "cpu"] = "auto"
    """'cpu' for a smoke test with a small model."""
    json: str | None = None
    """Write the figures to this file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement, in its own process."""

    part: str
    model: str
    tp: int
    device: str
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
        parallel=ParallelConfig(tp_size=job.tp, timeout_s=timeout_s),
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
    shorten = 64 if job.device == "cpu" else 1
    config = config_of(job, max_running=len(work.output_lens), context=4096)
    if job.device == "cpu":
        work = replace(work, prompts=1, prompt_tokens=32, output_lens=work.output_lens[:2])
    with launch(config) as replica:
        vocab = replica.state().vocab_size
        replica.submit(work.requests(vocab, seed=1, shorten=16 * shorten))
        finish(replica)
        replica.send(FlushCache())
        requests = work.requests(vocab, seed=2, shorten=shorten)
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


def run_job(job: Job, deadline_s: float) -> dict[str, Any]:
    """The figures of one job, taken in a process of its own; {"failed": why} if it fails."""
    ranks = job.tp if job.part == "collectives" else 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        place = str(Path(folder) / "meeting")
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--job", json.dumps(asdict(each)), str(out)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            for each in (replace(job, rank=rank, meeting_place=place) for rank in range(ranks))
        ]
        try:
            text = children[0].communicate(timeout=deadline_s)[0]
            for child in children[1:]:
                child.wait(30)
        except subprocess.TimeoutExpired:
            return {"failed": f"no end within {deadline_s:g} s"}
        finally:
            for child in children:
                child.kill()
        if children[0].returncode or not out.exists():
            return {"failed": f"exit code {children[0].returncode}\n{text[-4000:]}"}
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures


def child_main(job_text: str, out: str) -> int:
    job = Job(**json.loads(job_text))
    figures = PARTS[job.part](job)
    if job.rank == 0:
        Path(out).write_text(json.dumps(figures))
    return 0


def compare(alone: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """How far the greedy rows agree, and the largest difference of prompt logprobs."""
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(alone["tokens"], together["tokens"], strict=True)
    ]
    prompt = np.abs(np.array(alone["prompt"]) - np.array(together["prompt"]))
    first = [abs(x[0] - y[0]) for x, y in zip(alone["logprobs"], together["logprobs"], strict=True)]
    return {
        "rows_equal": sum(s == len(x) for s, x in zip(same, alone["tokens"], strict=True)),
        "rows": len(same),
        "mean_tokens_until_they_part": float(np.mean(same)),
        "prompt_logprob_max_diff": float(prompt.max()),
        "first_logprob_max_diff": max(first),
    }


class Suite:
    """Runs the parts and keeps what they found."""

    def __init__(self, options: Options, small: str) -> None:
        self.options = options
        self.small = small
        self.results: dict[str, Any] = {}
        self.num_failed = 0

    def take(self, title: str, job: Job) -> dict[str, Any] | None:
        """Run a job; print and count a failure."""
        found = run_job(job, self.options.deadline_s)
        if "failed" in found:
            self.num_failed += 1
            print(f"{title}: FAILED {found['failed']}", flush=True)
            return None
        return found

    def job(self, part: str, tp: int, **fields: Any) -> Job:
        return Job(part=part, model=self.small, tp=tp, device=self.options.device, **fields)

    def keep(self, title: str, found: dict[str, Any], good: bool = True) -> None:
        self.num_failed += not good
        self.results[title] = found
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
        print(f"{title}: {'' if good else 'WRONG '}{shown}", flush=True)

    def agreement(self) -> None:
        first, *others = self.options.tp
        for dtype in ("float32", "bfloat16"):
            alone = self.take(f"agreement tp {first}", self.job("agreement", first, dtype=dtype))
            for tp in others:
                title = f"agreement {dtype} tp {tp} to {first}"
                together = self.take(title, self.job("agreement", tp, dtype=dtype))
                if alone and together:
                    found = compare(alone, together)
                    exact = found["rows_equal"] == found["rows"]
                    close = found["prompt_logprob_max_diff"] < 0.3
                    self.keep(title, found, exact if dtype == "float32" else close)

    def faults(self) -> None:
        tp = max(self.options.tp)
        for name in ("killed", "stopped"):
            title = f"faults tp {tp} rank 1 {name}"
            if found := self.take(title, self.job("faults", tp, name=name)):
                named = "rank 1" in "".join(found["message"])
                self.keep(title, found, found["error"] == "EngineDead" and named)

    def collectives(self) -> None:
        for tp in self.options.tp:
            title = f"all-reduce us tp {tp}"
            if tp == 1 or self.options.device == "cpu":
                continue
            if found := self.take(title, self.job("collectives", tp)):
                self.keep(title, found)

    def speed(self) -> None:
        for name in self.options.workloads:
            for tp in self.options.tp:
                title = f"speed {name} tp {tp}"
                job = replace(self.job("speed", tp, name=name), model=self.options.model)
                if found := self.take(title, job):
                    self.keep(title, found)


def main() -> int:
    """Measure and print."""
    options = tyro.cli(Options)
    print(f"{describe()} x {torch.cuda.device_count()}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "config.json"
        small.write_text(json.dumps(SMALL))
        suite = Suite(options, str(small))
        for part in options.parts:
            try:
                getattr(suite, part)()
            except Exception:
                suite.num_failed += 1
                traceback.print_exc()
    if options.json:
        report = {
            "machine": describe(),
            "gpus": torch.cuda.device_count(),
            "torch": torch.__version__,
            "options": {k: v for k, v in asdict(options).items() if k != "json"},
            "results": suite.results,
        }
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{suite.num_failed} failed", flush=True)
    return int(suite.num_failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        sys.exit(child_main(*sys.argv[2:]))
    sys.exit(main())
