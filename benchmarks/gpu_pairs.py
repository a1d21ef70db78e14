"""Two versions of the project on one GPU, in alternating runs of one command.

    python benchmarks/gpu_pairs.py --before OTHER_CHECKOUT --pairs 3 \
        -- benchmarks/gpu_rollout.py --model benchmarks/shapes/qwen2.5-1.5b.json --attention triton

Everything behind `--` is a benchmark of this folder and its options; it runs in a fresh process
of either checkout in turn and writes JSON, of which the figures named by `--figures` are compared:
medians of the runs, and the spread of either side. A ratio inside the older side's spread is noise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from checkout import ROOT
from machine import describe


@dataclass(frozen=True)
class Options:
    """What to compare."""

    before: str
    """Checkout of the older version."""
    pairs: int = 3
    """Runs of either side."""
    figures: tuple[str, ...] = ("tokens_per_s",)
    """Keys whose values are compared, wherever they stand in the JSON."""
    json: str | None = None
    """Write the comparison to this file."""


def figures_of(result: Any, names: Sequence[str], path: str = "") -> dict[str, float]:
    """Every number under one of `names`, by its path in the JSON."""
    found: dict[str, float] = {}
    if isinstance(result, dict):
        for key, value in result.items():
            where = f"{path}/{key}" if path else key
            if key in names and isinstance(value, int | float):
                found[where] = float(value)
            elif isinstance(value, dict | list):
                found |= figures_of(value, names, where)
    elif isinstance(result, list):
        for index, value in enumerate(result):
            found |= figures_of(value, names, f"{path}/{index}")
    return found


def run_once(checkout: Path, words: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The figures of one run in a process of its own, with the checkout's own code."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.json"
        extra = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(checkout), *(path for path in extra if path and path != str(ROOT))]
        done = subprocess.run(
            [sys.executable, *words, "--json", str(target)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode or not target.exists():
            raise SystemExit(f"{' '.join(words)} in {checkout} failed:\n{done.stdout[-3000:]}")
        return figures_of(json.loads(target.read_text()), names)


def compare(before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, Any]:
    """By figure: medians, ratio after / before, and (largest - smallest) / median of each side."""
    table: dict[str, Any] = {}
    for key in before[0]:
        sides = [[run[key] for run in runs if key in run] for runs in (before, after)]
        medians = [statistics.median(side) for side in sides]
        spreads = [
            (max(side) - min(side)) / middle for side, middle in zip(sides, medians, strict=True)
        ]
        table[key] = {
            "before": sides[0],
            "after": sides[1],
            "median_before": medians[0],
            "median_after": medians[1],
            "ratio": medians[1] / medians[0],
            "spread_before": spreads[0],
            "spread_after": spreads[1],
        }
    return table


def main() -> None:
    """Run the pairs and print one line a figure."""
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, words = tyro.cli(Options, args=given[:cut], description=__doc__), given[cut + 1 :]
    if not words:
        raise SystemExit("gpu_pairs.py: name a benchmark and its options behind --")
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for pair in range(options.pairs):
        sides = [("before", Path(options.before).resolve()), ("after", ROOT)]
        for name, checkout in sides if pair % 2 == 0 else reversed(sides):
            runs[name].append(run_once(checkout, words, options.figures))
            print(f"pair {pair} {name}: {runs[name][-1]}", flush=True)
    table = compare(runs["before"], runs["after"])
    for key, row in table.items():
        print(
            f"{key:48s} {row['median_before']:12.2f} -> {row['median_after']:12.2f}  "
            f"ratio {row['ratio']:.4f}  spread {row['spread_before']:.4f} {row['spread_after']:.4f}"
        )
    if options.json:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": describe(),
            "command": words,
            "pairs": options.pairs,
            "figures": table,
        }
        Path(options.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
