"""Asynchronous training learns what synchronous training does, on a CPU.

    python benchmarks/async_learning.py --seeds 0-2 --json async.json

The task is two-digit addition, the model a Llama of two layers and a token a character
(`tests/helpers/char_model.py`). Each seed is tuned once until it is right in about a third of the
cases; from there GRPO goes on, synchronously and with rollouts of several ages. Prints a row a
run: held-out accuracy before and after, the lag of tokens, and who waited for whom.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (first: the project is imported from here)
import torch
import tyro
from machine import describe

from recipes import grpo
from tests.helpers.char_model import char_model, fine_tune, write_char_model

STALENESS = 2
AHEAD = ["--async", "--max-staleness", str(STALENESS)]
DECOUPLED = ["--no-bypass", "--is-level", "token", "--is-mode", "zero", "--is-cap", "5"]
SETTINGS: dict[str, list[str]] = {
    "synchronous": [],
    "staleness 0": ["--async", "--max-staleness", "0"],
    "one process": AHEAD,
    "one process, decoupled": [*AHEAD, *DECOUPLED],
    "two processes": [*AHEAD, "--rollout-gpus", "1"],
}
GRPO = [
    *("--device", "cpu", "--dtype", "float32", "--kv-memory-gb", "0.1", "--max-new-tokens", "5"),
    *("--eval-prompts", "256", "--eval-every", "20", "--checkpoint-every", "0", "--steps", "80"),
    *("--prompts-per-step", "24", "--samples", "8", "--lr", "5e-5"),
]
TUNED_TO = 0.3
WITHIN = 0.03


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: str = "0-2"
    """First and last seed."""
    json: str | None = None
    """Write every run to this file, beside those of other seeds that are in it."""


@dataclass(frozen=True)
class Outcome:
    """One run. accuracies: held-out, before, at each evaluation and after. The waits are shares:
    of its time for the trainer of two processes, of an update for the engine of one."""

    setting: str
    seed: int
    accuracies: list[float]
    seconds: float
    lag_mean: float
    lag_max: int
    versions_per_sample: float
    trainer_wait_share: float
    engine_wait: float


def write_additions(path: Path) -> str:
    """All sums of two numbers of two digits, as prompt and answer."""
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        for a in range(10, 100)
        for b in range(10, 100)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measure(seed: int, folder: Path) -> list[Outcome]:
    """One seed: tuned once, then every setting."""
    task = write_additions(folder / "additions.jsonl")
    model = char_model(hidden=64, layers=2, seed=seed)
    fine_tune(model, accuracy=TUNED_TO)
    write_char_model(folder / "tuned", model)
    words = [*GRPO, "--task", task, "--model", str(folder / "tuned"), "--seed", str(seed)]
    return [
        run(setting, seed, [*words, *flags], folder / f"run-{place}")
        for place, (setting, flags) in enumerate(SETTINGS.items())
    ]


def run(setting: str, seed: int, words: list[str], out: Path) -> Outcome:
    """One run of the recipe, quietly."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = grpo.main([*words, "--out", str(out)])
    if code:
        raise SystemExit(told.getvalue()[-2000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    waits = ("async/engine_wait_s", "async/engine_wait_steps")
    found = [summary["eval_before"], *(r["eval/accuracy"] for r in rows if "eval/accuracy" in r)]
    outcome = Outcome(
        setting=setting,
        seed=seed,
        accuracies=[round(value, 3) for value in found],
        seconds=round(summary["seconds"], 1),
        lag_mean=round(_mean(rows, "async/staleness_mean"), 3),
        lag_max=int(max(row.get("async/staleness_max", 0) for row in rows)),
        versions_per_sample=round(_mean(rows, "async/versions_per_sample"), 2),
        trainer_wait_share=round(
            _mean(rows, "timing_s/generate") / max(_mean(rows, "timing_s/step"), 1e-9), 3
        ),
        engine_wait=round(sum(_mean(rows, name) for name in waits), 3),
    )
    show(outcome)
    return outcome


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows) / len(rows)


def show(outcome: Outcome) -> None:
    """One row of the table."""
    curve = " ".join(f"{value:.2f}" for value in outcome.accuracies)
    print(
        f"{outcome.setting:24s} seed {outcome.seed}  {curve}  lag {outcome.lag_mean:.2f}, most "
        f"{outcome.lag_max}  ({outcome.seconds:.0f} s)",
        flush=True,
    )


def main() -> None:
    """Run everything, and compare the means over seeds with those of synchronous runs."""
    options = tyro.cli(Options)
    # The model is too small for more: threads would only wait for each other.
    torch.set_num_threads(1)
    first, _, last = options.seeds.partition("-")
    outcomes: list[Outcome] = []
    for seed in range(int(first), int(last or first) + 1):
        with tempfile.TemporaryDirectory() as folder:
            outcomes += measure(seed, Path(folder))
    kept = [asdict(outcome) for outcome in outcomes]
    if options.json:
        kept = write(kept, Path(options.json))
    compare(kept)


def compare(runs: list[dict[str, Any]]) -> None:
    """Say how far each setting is from the synchronous one, where it was measured."""
    means = {
        setting: [each["accuracies"][-1] for each in runs if each["setting"] == setting]
        for setting in SETTINGS
    }
    for setting, found in means.items():
        apart = sum(found) / len(found) - sum(means["synchronous"]) / len(means["synchronous"])
        within = "within" if abs(apart) <= WITHIN else "NOT within"
        print(f"{setting:24s} {apart:+.3f}, {within} {WITHIN} of synchronous ({len(found)} seeds)")


def write(runs: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """What was measured, now and before of other seeds."""
    seeds = {each["seed"] for each in runs}
    before = json.loads(path.read_text())["runs"] if path.exists() else []
    kept = [each for each in before if each["seed"] not in seeds] + runs
    kept.sort(key=lambda each: (each["seed"], list(SETTINGS).index(each["setting"])))
    record = {
        "machine": describe(),
        "torch": torch.__version__,
        "grpo": GRPO,
        "settings": SETTINGS,
        "runs": kept,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return kept


if __name__ == "__main__":
    main()
