"""Runs the rows of `recipes/README.md`, and writes its table from what the runs left.

    python benchmarks/recipes_table.py --rows grpo ppo --machine "2-core Xeon"
    python benchmarks/recipes_table.py --only-write          # the table again, from the results

Each row is a command (`ROWS`). A row's run is kept in `benchmarks/results/recipes.json` under its
name and machine, with its held-out accuracy over steps; the table shows what is in that file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checkout
import tyro
from machine import describe

from recipes.run.run_folder import RunFolder

RESULTS = checkout.ROOT / "benchmarks" / "results" / "recipes.json"
PAGE = checkout.ROOT / "recipes" / "README.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
BARS = "▁▂▃▄▅▆▇█"

ROWS: dict[str, tuple[str, str]] = {
    "grpo": ("GRPO with DAPO's changes, the default", "grpo.py"),
    "ppo": ("PPO, critic on the policy's network", "ppo.py"),
    "reinforce++": (
        "REINFORCE++, one reply a problem",
        "grpo.py --algorithm reinforce++ --samples 1 --prompts-per-step 64 --steps 60",
    ),
    "reinforce++-baseline": (
        "the same less the mean of a group",
        "grpo.py --algorithm reinforce++-baseline --steps 60",
    ),
    "rloo": ("RLOO", "grpo.py --algorithm rloo"),
    "remax": ("ReMax", "grpo.py --algorithm remax"),
    "async": (
        "GRPO, two steps' groups started ahead, engine and trainer in turns",
        "grpo.py --async --max-staleness 2",
    ),
    "float16": ("GRPO in float16", "grpo.py --dtype float16 --steps 30"),
    "sft": ("supervised, the task's answers", "sft.py --steps 20"),
    "code": ("expressions that hit a target, run in the sandbox", "grpo.py --task expression"),
    "opd": (
        "distilled from the model that `grpo.py --out runs/teacher` left",
        "grpo.py --algorithm opd --teacher runs/teacher/model --steps 30",
    ),
}
"""What a row is called: what it shows, and its command behind `python recipes/`."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    rows: list[str] = field(default_factory=list)
    """Names of the rows to run; none runs all of them."""
    flags: str = ""
    """Flags added to every command, e.g. "--eval-every 10 --device cuda"."""
    machine: str | None = None
    """What the machine is called in the table; None asks the machine."""
    at_once: int = 1
    """Runs side by side; their minutes are then those of a shared machine, and the row says so."""
    threads: int = 0
    """Processor threads of one run; 0 leaves it to torch."""
    only_write: bool = False
    """Run nothing: write the table from the results that are there."""


@dataclass(frozen=True)
class Row:
    """One run. accuracies: held-out, before, at each evaluation and after."""

    name: str
    machine: str
    model: str
    dtype: str
    steps: int
    minutes: float
    side_by_side: int
    accuracies: list[float]


def run_row(name: str, options: Options) -> Row:
    """Run a row's command to its end. Raises RuntimeError with the end of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*ROWS[name][1].split(), *options.flags.split(), "--out", str(out)]
        script, flags = checkout.ROOT / "recipes" / words[0], words[1:]
        threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
        done = subprocess.run(
            [sys.executable, str(script), *flags, "--checkpoint-every", "0"],
            cwd=checkout.ROOT,
            env=checkout.environment(**threads),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-800:]}")
        return _row(name, options, out)


def _row(name: str, options: Options, out: Path) -> Row:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    metrics = RunFolder(out, active=False).read_metrics()
    seen = [row["eval/accuracy"] for row in metrics if "eval/accuracy" in row]
    if not seen or seen[-1] != summary["eval_after"]:
        seen.append(summary["eval_after"])
    return Row(
        name=name,
        machine=options.machine or describe(),
        model=Path(summary["model"]).name,
        dtype=summary["dtype"],
        steps=summary["steps"],
        minutes=round(summary["seconds"] / 60, 1),
        side_by_side=options.at_once,
        accuracies=[round(value, 3) for value in [summary["eval_before"], *seen]],
    )


def keep(rows: list[Row]) -> list[dict[str, Any]]:
    """Put rows into the results, each in place of an older one of its name and machine."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = {(row.name, row.machine) for row in rows}
    kept = [row for row in kept if (row["name"], row["machine"]) not in new]
    kept += [asdict(row) for row in rows]
    order = list(ROWS)
    kept.sort(key=lambda row: (order.index(row["name"]), row["machine"]))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def write_page(rows: list[dict[str, Any]]) -> None:
    """The table between the page's marks."""
    lines = [
        "| what | command | dtype | machine | steps | minutes | held-out accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what, command = ROWS[row["name"]]
        beside = f", {row['side_by_side']} runs at once" if row["side_by_side"] > 1 else ""
        lines.append(
            f"| {what} | `python recipes/{command}` | {row['dtype']} | {row['machine']}{beside} "
            f"| {row['steps']} | {row['minutes']:g} | {_curve(row['accuracies'])} |"
        )
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + tail)


def _curve(accuracies: list[float]) -> str:
    bars = "".join(BARS[min(int(value * len(BARS)), len(BARS) - 1)] for value in accuracies)
    return f"{bars} {accuracies[0]:.2f} to {accuracies[-1]:.2f}"


def main() -> None:
    """Run the rows and write the table."""
    options = tyro.cli(Options)
    names = [] if options.only_write else options.rows or list(ROWS)
    with ThreadPoolExecutor(options.at_once) as pool:
        rows = list(pool.map(lambda name: run_row(name, options), names))
    for row in rows:
        print(f"{row.name:24s} {_curve(row.accuracies)}  {row.minutes:g} min", flush=True)
    write_page(keep(rows))


if __name__ == "__main__":
    main()
