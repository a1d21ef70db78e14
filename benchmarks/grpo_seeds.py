"""Held-out accuracy of many runs of a recipe at once: several settings, several seeds.

    python benchmarks/grpo_seeds.py --seeds 0-19 --at-once 8 --json out.json \
        --settings "|--warmup-steps 10" -- --steps 40 --eval-every 10

Each setting is flags of `recipes/grpo.py`, put before those behind `--`; `--recipe ppo` runs that
one. Runs share the GPU, or the processor's cores, `--at-once` of them. Prints one row a run as it
ends, then one a setting: how many seeds gained 0.5 or more, and the lowest accuracy at the end.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import checkout
import torch
import tyro
from machine import describe

from recipes.run.run_folder import RunFolder

WANTED_GAIN = 0.5


@dataclass(frozen=True)
class Options:
    """What to run."""

    recipe: Literal["grpo", "ppo"] = "grpo"
    """Which recipe runs."""
    settings: str = ""
    """Flags of each setting, settings separated by "|"; an empty one is the defaults."""
    seeds: str = "0-2"
    """First and last seed."""
    at_once: int = 8
    """Runs side by side."""
    threads: int = 1
    """Processor threads of one run."""
    json: str | None = None
    """Write every run to this file."""


@dataclass(frozen=True)
class Outcome:
    """One run. accuracies: held-out, before and at each evaluation. failed: why it has none."""

    setting: str
    seed: int
    accuracies: list[float]
    rewards: list[float]
    no_spread: list[float]
    entropy: list[float]
    seconds: float
    failed: str = ""

    @property
    def gain(self) -> float:
        """Last accuracy less the first."""
        return self.accuracies[-1] - self.accuracies[0]


def run_one(recipe: str, setting: str, seed: int, flags: list[str], threads: int) -> Outcome:
    """One run of the recipe in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*setting.split(), *flags, "--seed", str(seed), "--out", str(out)]
        done = subprocess.run(
            [sys.executable, f"recipes/{recipe}.py", *words, "--checkpoint-every", "0"],
            cwd=checkout.ROOT,
            env=checkout.environment(OMP_NUM_THREADS=str(threads)),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return Outcome(setting, seed, [0.0], [], [], [], 0.0, done.stderr[-800:])
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        rows = RunFolder(out, active=False).read_metrics()
        steps = [row for row in rows if "reward" in row]
        seen = [row["eval/accuracy"] for row in steps if "eval/accuracy" in row]
        if summary["steps"] != len(steps) or not seen or seen[-1] != summary["eval_after"]:
            seen.append(summary["eval_after"])
        return Outcome(
            setting,
            seed,
            [round(value, 4) for value in [summary["eval_before"], *seen]],
            [round(row["reward"], 4) for row in steps],
            [round(row["frac_reward_zero_std"], 4) for row in steps],
            [round(row["entropy"], 4) for row in steps if "entropy" in row],
            summary["seconds"],
        )


def show(outcome: Outcome) -> None:
    """One row of the table."""
    path = " ".join(f"{value:.3f}" for value in outcome.accuracies)
    text = outcome.failed.replace("\n", " ") or f"{path}  ({outcome.seconds:.0f} s)"
    print(f"{outcome.setting or 'default':44s} seed {outcome.seed:2d}  {text}", flush=True)


def main() -> None:
    """Run everything and print what each setting came to."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, flags = tyro.cli(Options, args=sys.argv[1:cut]), sys.argv[cut + 1 :]
    settings = [setting.strip() for setting in options.settings.split("|")]
    first, _, last = options.seeds.partition("-")
    jobs = [
        (setting, seed)
        for seed in range(int(first), int(last or first) + 1)
        for setting in settings
    ]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.at_once) as pool:
        running = [
            pool.submit(run_one, options.recipe, setting, seed, flags, options.threads)
            for setting, seed in jobs
        ]
        for future in running:
            outcomes.append(future.result())
            show(outcomes[-1])
    for setting in settings:
        mine = [o for o in outcomes if o.setting == setting and not o.failed]
        ends = [o.accuracies[-1] for o in mine]
        good = sum(o.gain >= WANTED_GAIN for o in mine)
        print(
            f"{setting or 'default':44s} {good} of {len(mine)} gain {WANTED_GAIN} or more, lowest "
            f"{min(ends, default=0):.3f}, median {statistics.median(ends or [0]):.3f}"
        )
    if options.json:
        record = {
            "machine": describe(),
            "torch": torch.__version__,
            "recipe": options.recipe,
            "flags": flags,
            "runs": [asdict(o) for o in outcomes],
        }
        Path(options.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
