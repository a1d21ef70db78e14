"""bfloat16 and float16 beside each other: mismatch, speed and learning of the recipe in each.

    python benchmarks/half_dtypes.py --json benchmarks/results/half-dtypes-h100.json
    python benchmarks/half_dtypes.py --parts speed --repeats 3 -- --prompts-per-step 32

Every run is `recipes/grpo.py` from the same checkpoint: the model in its bfloat16 form, written as
a folder first, so that neither dtype gets weights that the other does not. Flags behind `--` go to
all runs.

- learning: each dtype and seed, `--at-once` runs side by side on one GPU. Held-out accuracy before
  and at each evaluation; the difference between the logprobs of engine and trainer at every step,
  as mean, maximum and k3; steps that loss scaling skipped.
- speed: each dtype in turns, `--repeats` times, alone on the machine. Rollout tokens a second and
  seconds of a step and its phases, medians over steps without the first.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import checkout
import torch
import tyro
from machine import describe

from recipes.run.run_folder import RunFolder
from recipes.settings.options import DEFAULT_MODEL
from rollout.launch import read_checkpoint
from rollout.offline import load_tokenizer
from trainer_bridge import load_causal_lm

GAP = "sampling/sampling_logp_difference"
MISMATCH = {"mean": f"{GAP}/mean", "max": f"{GAP}/max", "k3": "rollout_corr/k3_kl"}
PHASES = ("step", "generate", "train", "push", "score", "other")
Part = Literal["learning", "speed"]


@dataclass(frozen=True)
class Options:
    """What to run."""

    model: str = str(DEFAULT_MODEL)
    """GGUF file or Hugging Face folder; it is written anew in bfloat16."""
    parts: tuple[Part, ...] = ("learning", "speed")
    """learning, speed or both."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    """Values of --dtype, in the order in which they take turns."""
    seeds: str = "0-2"
    """First and last seed of the learning runs."""
    steps: int = 30
    """Steps of a learning run."""
    eval_every: int = 10
    """Steps between its evaluations."""
    at_once: int = 6
    """Learning runs side by side."""
    threads: int = 1
    """Processor threads of one run."""
    speed_steps: int = 8
    """Steps of a speed run, of which the first is not counted."""
    repeats: int = 2
    """Speed runs of each dtype."""
    json: str | None = None
    """Write the record to this file, anew after every run."""


@dataclass(frozen=True)
class Job:
    """One run: its part, its --dtype, its seed."""

    part: Part
    dtype: str
    seed: int


def export_bfloat16(model: str, folder: Path) -> None:
    """Write a model as a Hugging Face folder in bfloat16, its tokenizer with it."""
    checkpoint = read_checkpoint(model)
    loaded: Any = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    loaded.to(dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(model).write_hf(folder)


def run_one(job: Job, model: Path, options: Options, flags: Sequence[str]) -> dict[str, Any]:
    """One run of the recipe in a process of its own, and its record."""
    learns = job.part == "learning"
    steps = options.steps if learns else options.speed_steps
    every = options.eval_every if learns else 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["--model", str(model), "--dtype", job.dtype, "--seed", str(job.seed)]
        words += ["--steps", str(steps), "--eval-every", str(every), "--checkpoint-every", "0"]
        done = subprocess.run(
            [sys.executable, "recipes/grpo.py", *words, *flags, "--out", str(out)],
            cwd=checkout.ROOT,
            env=checkout.environment(OMP_NUM_THREADS=str(options.threads)),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {**asdict(job), "failed": done.stderr[-1200:]}
        summary = json.loads((out / "summary.json").read_text())
        rows = RunFolder(out, active=False).read_metrics()
    assert summary["dtype"] == job.dtype, "another dtype was trained"
    return {**asdict(job), **figures_of(rows, summary)}


def figures_of(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """The record of a run from its steps' figures and its summary."""
    seen = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    if "eval/accuracy" not in rows[-1]:
        seen.append(summary["eval_after"])
    counted = rows[1:] or rows
    measured = [row for row in rows if MISMATCH["mean"] in row]
    return {
        "accuracies": [round(value, 4) for value in (summary["eval_before"], *seen)],
        "rewards": [round(row["reward"], 4) for row in rows],
        "mismatch": {name: [row[key] for row in measured] for name, key in MISMATCH.items()},
        "rollout_tokens_per_s": statistics.median(r["perf/rollout_tokens_per_s"] for r in counted),
        "seconds": {p: statistics.median(r[f"timing_s/{p}"] for r in counted) for p in PHASES},
        "run_seconds": summary["seconds"],
        "skipped_steps": rows[-1].get("train/skipped_steps", 0.0),
        "loss_scale": rows[-1].get("train/loss_scale"),
    }


def summarise(runs: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """All runs of a dtype together: means over steps and seeds, the largest maximum, medians of
    the speed runs, and what failed."""
    fine = [run for run in runs if run["dtype"] == dtype and "failed" not in run]
    learning = [run for run in fine if run["part"] == "learning"]
    speed = [run for run in fine if run["part"] == "speed"]
    found: dict[str, Any] = {"failed": sum(r["dtype"] == dtype and "failed" in r for r in runs)}
    if learning:
        joined = {name: [v for r in learning for v in r["mismatch"][name]] for name in MISMATCH}
        found["accuracies"] = {run["seed"]: run["accuracies"] for run in learning}
        found["mismatch_mean"] = statistics.fmean(joined["mean"])
        found["mismatch_max"] = max(joined["max"])
        found["mismatch_k3"] = statistics.fmean(joined["k3"])
        found["skipped_steps"] = {run["seed"]: run["skipped_steps"] for run in learning}
    if speed:
        found["rollout_tokens_per_s"] = statistics.median(r["rollout_tokens_per_s"] for r in speed)
        found["seconds"] = {p: statistics.median(r["seconds"][p] for r in speed) for p in PHASES}
    return found


def jobs_of(options: Options, part: Part) -> list[Job]:
    """The runs of a part; dtypes take turns."""
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    if part == "speed":
        seeds = range(options.repeats)
    return [Job(part, dtype, seed) for seed in seeds for dtype in options.dtypes]


def show(run: dict[str, Any]) -> None:
    """One line for a run."""
    told = f"{run['part']:9s} {run['dtype']:9s} {run['seed']:2d}  "
    if "failed" in run:
        print(told + run["failed"].replace("\n", " "), flush=True)
        return
    path = " ".join(f"{value:.3f}" for value in run["accuracies"])
    gap = statistics.fmean(run["mismatch"]["mean"])
    print(
        f"{told}{path}  |dlogp| {gap:.1e} max {max(run['mismatch']['max']):.1e}  "
        f"{run['rollout_tokens_per_s']:.0f} tok/s, step {run['seconds']['step']:.2f} s, "
        f"skipped {run['skipped_steps']:.0f}",
        flush=True,
    )


def main() -> None:
    """Run everything, print a line a run and a summary a dtype."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, flags = tyro.cli(Options, args=sys.argv[1:cut]), sys.argv[cut + 1 :]
    runs: list[dict[str, Any]] = []

    def record() -> dict[str, Any]:
        return {
            "options": {**asdict(options), "model": Path(options.model).name, "json": None},
            "flags": flags,
            "machine": describe(),
            "torch": torch.__version__,
            "summary": {dtype: summarise(runs, dtype) for dtype in options.dtypes},
            "runs": runs,
        }

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "bfloat16"
        export_bfloat16(options.model, model)
        for part in options.parts:
            at_once = options.at_once if part == "learning" else 1
            with ThreadPoolExecutor(at_once) as pool:
                jobs = jobs_of(options, part)
                for run in pool.map(lambda job: run_one(job, model, options, flags), jobs):
                    runs.append(run)
                    show(run)
                    if options.json:
                        Path(options.json).write_text(json.dumps(record(), indent=1) + "\n")
    print(json.dumps(record()["summary"], indent=1))


if __name__ == "__main__":
    main()
