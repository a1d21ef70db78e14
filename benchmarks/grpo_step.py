"""Seconds of a GRPO step: the recipe against a plain script, in one run on the same machine.

    python benchmarks/grpo_step.py

Both train the same model on the same problems, 8 prompts x 8 samples by default, with the same
learning rate and dtype. The first step of each warms up and is not counted; medians are compared.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from grpo_baseline import Baseline
from machine import describe

from engine.executor import read_checkpoint
from recipes.environments.base import problem_at
from recipes.environments.select import select_environment
from recipes.grpo import train
from recipes.ledger import Ledger
from recipes.options import DEFAULT_MODEL, Options, RolloutOptions
from recipes.prompts import Prompts
from recipes.run import open_run
from recipes.trainers.options import OptimizerOptions
from rollout.offline import load_tokenizer
from trainer_bridge import load_causal_lm

PHASES = ("generate", "score", "train", "push", "other", "step")


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str = str(DEFAULT_MODEL)
    """Model both sides train."""
    task: str = "largest"
    """Task both sides train on."""
    dtype: str = "auto"
    """Rollouts and autocast of both sides; 'auto' is what the engine takes on this machine."""
    baseline_dtype: str | None = None
    """Another dtype for the baseline; None is the same."""
    steps: int = 6
    """Counted steps of each side."""
    prompts: int = 8
    """Prompts a step."""
    samples: int = 8
    """Samples a prompt."""
    lr: float = 1e-5
    """Learning rate."""
    rows_per_microbatch: int = 16
    """Rows the baseline trains on at once."""
    seed: int = 0
    """Seed of problems and sampling."""
    json: str | None = None
    """Write the figures to this file."""


def run_ours(bench: Bench, folder: Path) -> tuple[list[dict[str, float]], str]:
    """Seconds by phase of each counted step of the recipe, and the dtype it ran in."""
    options = Options(
        task=bench.task,
        model=bench.model,
        dtype=bench.dtype,  # type: ignore[arg-type]
        seed=bench.seed,
        steps=bench.steps + 1,
        out=str(folder / "run"),
        eval_every=0,
        eval_prompts=1,
        checkpoint_every=0,
        rollout=RolloutOptions(prompts_per_step=bench.prompts, samples=bench.samples),
        optimizer=OptimizerOptions(lr=bench.lr),
    )
    run = open_run(options, Ledger())
    run.begin()
    train(run)
    rows = run.folder.read_metrics()[1:]
    dtype = run.actor.state().dtype
    run.actor.close()
    return [_ours_figures(row, bench.prompts) for row in rows], dtype


def _ours_figures(row: dict[str, Any], prompts: int) -> dict[str, float]:
    return {
        **{phase: row[f"timing_s/{phase}"] for phase in PHASES},
        "reward": row["reward"],
        "mixed_groups": prompts * (1 - row["frac_reward_zero_std"]),
        "mean_length": row["completions/mean_length"],
    }


def run_baseline(bench: Bench, dtype: torch.dtype) -> list[dict[str, float]]:
    """Seconds by phase of each counted step of the plain script."""
    environment = select_environment(bench.task)
    tokenizer = load_tokenizer(bench.model)
    checkpoint = read_checkpoint(bench.model)
    baseline = Baseline(
        load_causal_lm(checkpoint.hf_config, checkpoint.tensors),
        Prompts(environment, tokenizer, tokenizer.eos_ids),
        dtype=dtype,
        samples=bench.samples,
        max_new_tokens=environment.max_new_tokens,
        lr=bench.lr,
        rows_per_microbatch=bench.rows_per_microbatch,
    )
    torch.manual_seed(bench.seed)
    measured = []
    for step in range(bench.steps + 1):
        indices = range(step * bench.prompts, (step + 1) * bench.prompts)
        problems = [problem_at(environment, "train", bench.seed, i) for i in indices]
        seconds = baseline.step(problems, environment)
        phases = {p: getattr(seconds, p) for p in ("generate", "score", "train", "push", "step")}
        measured.append({**phases, "other": 0.0, **seconds.extra})
    return measured[1:]


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each figure over steps."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def measure(bench: Bench) -> dict[str, Any]:
    """Run both sides, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        our_rows, dtype = run_ours(bench, Path(folder))
    baseline_dtype = bench.baseline_dtype or dtype
    their_rows = run_baseline(bench, getattr(torch, baseline_dtype))
    ours, theirs = medians(our_rows), medians(their_rows)
    return {
        "options": {**asdict(bench), "model": Path(bench.model).name, "json": None},
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": {"slipstream": dtype, "baseline": baseline_dtype},
        "seconds": {"slipstream": ours, "baseline": theirs},
        "steps": {"slipstream": our_rows, "baseline": their_rows},
        "ratio": ours["step"] / theirs["step"],
    }


def main() -> None:
    """Measure and print."""
    bench = tyro.cli(Bench)
    result = measure(bench)
    names = (*PHASES, "mixed_groups", "reward", "mean_length")
    print(f"{'median a step':14s}" + "".join(f"{name:>13s}" for name in names))
    for side, figures in result["seconds"].items():
        print(f"{side:14s}" + "".join(f"{figures[name]:13.3f}" for name in names))
    print(
        f"step ratio {result['ratio']:.2f} ({result['machine']}, {result['threads']} threads, "
        f"{result['dtype']['slipstream']} against {result['dtype']['baseline']})"
    )
    if bench.json:
        Path(bench.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
