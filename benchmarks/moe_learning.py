"""A tiny mixture of experts learns on a CPU, from random weights: a short SFT, then GRPO.

    python benchmarks/moe_learning.py --seeds 0-2 --json benchmarks/results/moe-learning-cpu.json

The task is the largest of four digits, the model a Qwen3-MoE of two layers and eight experts
(`tests/helpers/char_experts.py`). Each seed is tuned once; from there GRPO goes on with routers
trained, frozen, and trained on the engine's routes. Prints a row a run: held-out accuracy after
the SFT and after GRPO, flips, and the entropy of the experts' loads in the last step.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (first: the project is imported from here)
import torch
import tyro
from machine import describe

from recipes import grpo, sft
from tests.helpers.char_experts import GRPO, SFT, write_char_experts, write_largest

SETTINGS = {
    "routers trained": [],
    "routers frozen": ["--freeze-router"],
    "routes replayed": ["--routing-replay"],
}
WANTED_GAIN = 0.2


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: str = "0-2"
    """First and last seed."""
    json: str | None = None
    """Write every run to this file."""


@dataclass(frozen=True)
class Outcome:
    """One run of GRPO. flips: mean share, None where nothing is replayed. entropy: nats."""

    setting: str
    seed: int
    after_sft: float
    after_grpo: float
    sft_seconds: float
    grpo_seconds: float
    flips: float | None
    load_entropy: float
    logprob_difference_max: float

    @property
    def gain(self) -> float:
        """What GRPO added to held-out accuracy."""
        return self.after_grpo - self.after_sft


def run(
    recipe: Callable[[list[str]], int], words: list[str], out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run of a recipe, quietly: its summary and its rows."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = recipe([*words, "--out", str(out)])
    if code:
        raise SystemExit(told.getvalue()[-2000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


def measure(seed: int, folder: Path) -> list[Outcome]:
    """One seed: tuned once, then every setting."""
    task = write_largest(folder / "largest.jsonl")
    both = ["--task", task, "--seed", str(seed)]
    cold = write_char_experts(folder / "cold", seed=seed)
    words = [*SFT, *both, "--eval-task", task, "--model", cold]
    tuned, _ = run(sft.main, words, folder / "sft")
    outcomes = []
    for index, (setting, flags) in enumerate(SETTINGS.items()):
        words = [*GRPO, *both, "--model", str(folder / "sft" / "model"), *flags]
        summary, rows = run(grpo.main, words, folder / f"grpo-{index}")
        flips = [row["router/replay_flips"] for row in rows if "router/replay_flips" in row]
        outcome = Outcome(
            setting=setting,
            seed=seed,
            after_sft=summary["eval_before"],
            after_grpo=summary["eval_after"],
            sft_seconds=round(tuned["seconds"], 1),
            grpo_seconds=round(summary["seconds"], 1),
            flips=round(sum(flips) / len(flips), 5) if flips else None,
            load_entropy=round(rows[-1]["router/load_entropy"], 3),
            logprob_difference_max=max(r["sampling/sampling_logp_difference/max"] for r in rows),
        )
        show(outcome)
        outcomes.append(outcome)
    return outcomes


def show(outcome: Outcome) -> None:
    """One row of the table."""
    told = "" if outcome.flips is None else f"  flips {outcome.flips:.4f}"
    print(
        f"{outcome.setting:26s} seed {outcome.seed}  {outcome.after_sft:.3f} -> "
        f"{outcome.after_grpo:.3f} ({outcome.gain:+.3f})  entropy {outcome.load_entropy:.2f}{told}"
        f"  ({outcome.grpo_seconds:.0f} s)",
        flush=True,
    )


def main() -> None:
    """Run everything, and say whether every run gained enough."""
    options = tyro.cli(Options)
    # The model is too small for more: threads would only wait for each other.
    torch.set_num_threads(1)
    first, _, last = options.seeds.partition("-")
    outcomes: list[Outcome] = []
    for seed in range(int(first), int(last or first) + 1):
        with tempfile.TemporaryDirectory() as folder:
            outcomes += measure(seed, Path(folder))
        if options.json:
            write(outcomes, Path(options.json))
    enough = sum(outcome.gain >= WANTED_GAIN for outcome in outcomes)
    print(f"{enough} of {len(outcomes)} gained {WANTED_GAIN} or more")


def write(outcomes: list[Outcome], path: Path) -> None:
    """What was measured so far."""
    record = {
        "machine": describe(),
        "torch": torch.__version__,
        "sft": SFT,
        "grpo": GRPO,
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
