"""Seconds of a GRPO step: the recipe, the recipe without its prefix tree, and a plain script.

    python benchmarks/grpo_step.py --json benchmarks/results/grpo-step-float32-xeon.json

All three train the same model on the same problems, 8 prompts x 8 samples by default, with the same
learning rate and dtype, by plain GRPO; a coin grades the replies, so that all train on as many
groups (`grpo_sides.Coin`). They take turns step by step, and each turn begins with another side.
The first step of each warms up and is not counted; medians are compared. Once with the task's own
short replies, then with replies of exactly as many tokens as `--lengths` says: the tree pays where
prompts are long and replies short, the engine everywhere.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
import tyro
from grpo_sides import FIGURES, OurSide, PlainSide, Side, Work
from machine import describe

from recipes.settings.options import DEFAULT_MODEL

TREE, PADDED, PLAIN = "slipstream", "slipstream, no prefix tree", "plain script"


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str = str(DEFAULT_MODEL)
    """Model all sides train."""
    task: str = "largest"
    """Task whose problems all sides train on."""
    dtype: str = "auto"
    """Rollouts and training of all sides; 'auto' is what the engine takes on this machine."""
    baseline_dtype: str | None = None
    """Another dtype for the plain script; None is the same."""
    lengths: tuple[int, ...] = (0, 128)
    """Tokens of every reply, one table part each; 0 ends replies as the task does."""
    steps: int = 4
    """Counted steps of each side."""
    prompts: int = 8
    """Prompts a step."""
    samples: int = 8
    """Samples a prompt."""
    lr: float = 1e-5
    """Learning rate."""
    rows_per_microbatch: int = 16
    """Rows that are trained on at once where there is no tree."""
    seed: int = 0
    """Seed of problems and sampling."""
    json: str | None = None
    """Write the figures to this file."""


def alternate(sides: Mapping[str, Side], steps: int) -> dict[str, list[dict[str, float]]]:
    """`steps` counted steps of each side, after one that is not counted. The sides take turns
    step by step, and the one that begins a turn ends the next."""
    names = list(sides)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(steps + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            row = sides[name].step()
            if turn:
                rows[name].append(row)
    return rows


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each figure over steps."""
    return {name: statistics.median(row[name] for row in rows) for name in FIGURES}


def measure(bench: Bench, length: int, folder: Path) -> dict[str, Any]:
    """One part of the table: all sides with replies of one length."""
    work = Work(
        model=bench.model,
        task=bench.task,
        dtype=bench.dtype,
        prompts=bench.prompts,
        samples=bench.samples,
        lr=bench.lr,
        rows=bench.rows_per_microbatch,
        seed=bench.seed,
        length=length,
    )
    with_tree = OurSide(work, folder / f"tree-{length}", tree=True)
    without = OurSide(work, folder / f"padded-{length}", tree=False)
    theirs = bench.baseline_dtype or with_tree.dtype
    plain = PlainSide(work, getattr(torch, theirs))
    sides: dict[str, Side] = {TREE: with_tree, PADDED: without, PLAIN: plain}
    try:
        rows = alternate(sides, bench.steps)
    finally:
        for side in sides.values():
            side.close()
    seconds = {name: medians(of_side) for name, of_side in rows.items()}
    return {
        "replies": work.replies,
        "dtype": {TREE: with_tree.dtype, PADDED: without.dtype, PLAIN: theirs},
        "seconds": seconds,
        "ratio": {name: seconds[name]["step"] / seconds[PLAIN]["step"] for name in seconds},
        "steps": rows,
    }


def table(parts: list[dict[str, Any]]) -> str:
    """The parts as Markdown: medians of a step in seconds, and the step over the plain script's."""
    names = [name for name in FIGURES if name != "other"]
    lines = ["| replies | side | " + " | ".join(names) + " | step / plain script's |"]
    lines.append("|" + "---|" * (len(names) + 3))
    for part in parts:
        for side, figures in part["seconds"].items():
            cells = [part["replies"], side, *(f"{figures[name]:.2f}" for name in names)]
            lines.append("| " + " | ".join(cells) + f" | {part['ratio'][side]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print; with `--json`, after every part, what there is so far."""
    bench = tyro.cli(Bench)
    result: dict[str, Any] = {
        "options": {**asdict(bench), "model": Path(bench.model).name, "json": None},
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parts": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for length in bench.lengths:
            result["parts"].append(measure(bench, length, Path(folder)))
            if bench.json:
                Path(bench.json).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']}, {result['threads']} threads, torch {result['torch']}")
    print(table(result["parts"]))


if __name__ == "__main__":
    main()
