"""GRPO beside TRL's GRPOTrainer with transformers' generation, on the CPU.

    make clients-test                    # the environment that has TRL
    .venv-clients/bin/python benchmarks/beside_trl.py --threads 8 --out beside-trl.json

Both train the same model on the same problems in the same order, by the same objective (plain GRPO:
ratio clipped at 0.2, mean over tokens of a reply, then over replies, advantages divided by the
group's deviation), learning rate, optimizer, batch, temperature and dtype; each draws replies with
random numbers of its own. Both are measured by one evaluation, greedy answers of our engine to the
same held-out problems, whose time counts for neither. Every side and seed is a process of its own,
one after the other. One of them alone, here or on another machine, and the table of all:

    ... beside_trl.py --side trl --seeds 0 --threads 4 --out trl-0.json
    ... beside_trl.py --merge trl-0.json trl-1.json ours-0.json ours-1.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import checkout
import tyro
from machine import processor

DEFAULT_MODEL = checkout.ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
OURS, TRL = "ours", "trl"
MOST_DIFFERENCE, MOST_RATIO = 0.1, 0.25
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Row = dict[str, Any]
"""One side and seed: its options, machine, and `beside_trl_sides.Result`."""


@dataclass(frozen=True)
class Bench:
    """What to train, and where to write it down."""

    side: Literal["both", "ours", "trl"] = "both"
    """Which to train."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of problems and sampling."""
    threads: int = 0
    """Threads of a process; 0 leaves them to torch."""
    out: str | None = None
    """Write the rows to this file."""
    merge: tuple[str, ...] = ()
    """Train nothing: read these files and print their table."""
    model: str = str(DEFAULT_MODEL)
    """Model both train."""
    task: str = "largest"
    """Task both train on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What both compute in; masters are float32."""
    steps: int = 30
    """Optimizer steps."""
    eval_every: int = 10
    """Steps between evaluations."""
    eval_prompts: int = 256
    """Held-out problems of an evaluation."""
    prompts: int = 8
    """Prompts a step."""
    samples: int = 8
    """Samples a prompt."""
    lr: float = 1e-5
    """Learning rate."""
    temperature: float = 1.0
    """Of sampling."""
    rows: int = 16
    """Sequences that TRL's trainer computes at once; ours takes what its own default is."""


def run_here(bench: Bench) -> Row:
    """Train the one side and seed of the options in this process."""
    import beside_trl_sides as sides
    import torch

    if bench.threads:
        torch.set_num_threads(bench.threads)
    (seed,) = bench.seeds
    names = {field.name for field in dataclasses.fields(sides.Work)}
    work = sides.Work(seed=seed, **{k: v for k, v in asdict(bench).items() if k in names})
    result = (sides.trl if bench.side == TRL else sides.ours)(work)
    return {
        "side": bench.side,
        "seed": seed,
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "work": {**asdict(work), "model": Path(bench.model).name},
        **result,
    }


def run_apart(bench: Bench, side: str, seed: int, folder: Path) -> Row:
    """Train one side and seed in a process of its own."""
    out = folder / f"{side}-{seed}.json"
    flags = [f"--side={side}", f"--out={out}", "--seeds", str(seed)]
    for field in dataclasses.fields(bench):
        if field.name not in ("side", "out", "seeds", "merge"):
            flags.append(f"--{field.name.replace('_', '-')}={getattr(bench, field.name)}")
    changes = {"OMP_NUM_THREADS": str(bench.threads)} if bench.threads else {}
    subprocess.run(
        [sys.executable, __file__, *flags],
        env=checkout.environment(**OFFLINE, **changes),
        stdout=sys.stderr,
        check=True,
    )
    (row,) = read(str(out))
    return row


def read(path: str) -> list[Row]:
    """The rows of a file."""
    rows: list[Row] = json.loads(Path(path).read_text())["rows"]
    return rows


def write(path: str, rows: list[Row]) -> None:
    """What there is so far, with what follows from it."""
    verdict = judge(rows)
    Path(path).write_text(json.dumps({"rows": rows, "verdict": verdict}, indent=2) + "\n")


def judge(rows: list[Row]) -> dict[str, Any]:
    """Differences of held-out accuracy by seed and step, and seconds of ours over those of TRL by
    seed; `holds` says whether all are within the bounds. Seeds of one side alone are left out."""
    found = {(row["side"], row["seed"]): row for row in rows}
    seeds = sorted(seed for side, seed in found if side == OURS and (TRL, seed) in found)
    differences, ratios = {}, {}
    for seed in seeds:
        mine, other = found[OURS, seed], found[TRL, seed]
        steps = sorted(mine["accuracy"].keys() & other["accuracy"].keys(), key=int)
        differences[str(seed)] = {
            step: mine["accuracy"][step] - other["accuracy"][step] for step in steps
        }
        ratios[str(seed)] = mine["seconds"] / other["seconds"]
    gaps = [abs(gap) for by_step in differences.values() for gap in by_step.values()]
    holds = bool(gaps) and max(gaps) <= MOST_DIFFERENCE and max(ratios.values()) <= MOST_RATIO
    return {"difference": differences, "ratio": ratios, "holds": holds}


def table(rows: list[Row]) -> str:
    """The rows as Markdown, and what follows from them."""
    steps = sorted({step for row in rows for step in row["accuracy"]}, key=int)
    lines = ["| side | seed | " + " | ".join(f"step {s}" for s in steps) + " | seconds |"]
    lines.append("|" + "---|" * (len(steps) + 3))
    for row in sorted(rows, key=lambda row: (row["seed"], row["side"])):
        held = [row["accuracy"].get(step) for step in steps]
        cells = ["" if value is None else f"{value:.3f}" for value in held]
        lines.append(
            f"| {row['side']} | {row['seed']} | {' | '.join(cells)} | {row['seconds']:.1f} |"
        )
    verdict = judge(rows)
    for seed, ratio in verdict["ratio"].items():
        gaps = ", ".join(f"{s}: {gap:+.3f}" for s, gap in verdict["difference"][seed].items())
        lines.append(f"seed {seed}: ours - TRL's at step {gaps}; seconds ours / TRL's {ratio:.3f}")
    return "\n".join(lines)


def main() -> int:
    """Train, print, write; 0 if the bounds hold, or where there is nothing to compare."""
    bench = tyro.cli(Bench, description=__doc__)
    if bench.prompts * bench.samples % bench.rows:
        raise SystemExit("--rows must divide --prompts times --samples")
    rows = [row for path in bench.merge for row in read(path)]
    if not rows and bench.side != "both" and len(bench.seeds) == 1:
        os.environ.update(OFFLINE)
        rows = [run_here(bench)]
    elif not rows:
        sides = [OURS, TRL] if bench.side == "both" else [bench.side]
        with tempfile.TemporaryDirectory() as folder:
            for seed in bench.seeds:
                for side in sides:
                    rows.append(run_apart(bench, side, seed, Path(folder)))
                    if bench.out:
                        write(bench.out, rows)
    if bench.out:
        write(bench.out, rows)
    print(table(rows))
    verdict = judge(rows)
    return 0 if verdict["holds"] or not verdict["ratio"] else 1


if __name__ == "__main__":
    sys.exit(main())
