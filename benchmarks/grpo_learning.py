"""Held-out accuracy before and after the recipe, on several seeds of the default task.

    python benchmarks/grpo_learning.py --json out.json -- --minutes 8

Flags after `--` go to `recipes/grpo.py`. Runs one seed after the other, prints a row for
each, and fails if any gains less than 0.30 absolute.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout
import torch
import tyro
from machine import describe

from recipes.run.run_folder import RunFolder

SEEDS = (0, 1, 2)
NEEDED_GAIN = 0.30


@dataclass(frozen=True)
class Options:
    """Where the runs are written down."""

    json: str | None = None
    """Write every run's summary to this file."""


def run_seed(seed: int, flags: list[str], folder: Path) -> dict[str, Any]:
    """One run of the recipe; its summary, with step figures from its metrics."""
    out = folder / f"seed{seed}"
    command = [sys.executable, "recipes/grpo.py", "--seed", str(seed), "--out", str(out), *flags]
    done = subprocess.run(
        command, cwd=checkout.ROOT, env=checkout.environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    steps = RunFolder(out, active=False).read_metrics()
    steps = [step for step in steps if "timing_s/step" in step]
    for key in ("step", "generate", "train", "push", "score", "other"):
        values = [step[f"timing_s/{key}"] for step in steps]
        summary[f"median_{key}_s"] = statistics.median(values)
    gap = "sampling/sampling_logp_difference"
    summary["logprob_difference_mean"] = max(step[f"{gap}/mean"] for step in steps)
    summary["logprob_difference_max"] = max(step[f"{gap}/max"] for step in steps)
    summary["reward_by_step"] = [round(step["reward"], 4) for step in steps]
    summary["model"] = Path(summary["model"]).name
    return summary


def main(argv: list[str]) -> int:
    """Run every seed; 1 if one gained too little."""
    own, flags = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    options = tyro.cli(Options, args=own, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            row = run_seed(seed, flags, Path(folder))
            rows.append(row)
            print(
                f"seed {seed}: {row['eval_before']:.3f} -> {row['eval_after']:.3f} in "
                f"{row['steps']} steps, {row['seconds']:.0f} s, step {row['median_step_s']:.2f} s, "
                f"logprob difference {row['logprob_difference_mean']:.1e}",
                flush=True,
            )
    result = {"machine": describe(), "torch": torch.__version__, "flags": flags, "runs": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    gains = [row["eval_after"] - row["eval_before"] for row in rows]
    return 0 if min(gains) >= NEEDED_GAIN else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
