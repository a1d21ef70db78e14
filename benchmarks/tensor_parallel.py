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
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import checkout
import numpy as np
import torch
import tyro
from machine import describe
from tensor_parallel_jobs import Job

_JOBS = Path(__file__).with_name("tensor_parallel_jobs.py")
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


def run_job(job: Job, deadline_s: float) -> dict[str, Any]:
    """The figures of one job, taken in a process of its own; {"failed": why} if it fails."""
    ranks = job.tp if job.part == "collectives" else 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        place = str(Path(folder) / "meeting")
        children = [
            subprocess.Popen(
                [sys.executable, str(_JOBS), json.dumps(asdict(each)), str(out)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=checkout.environment(),
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
    sys.exit(main())
