"""What a sharded update costs by every way and mode, on whatever GPUs there are.

    python benchmarks/sharded_update.py --model shapes/qwen3-8b.json --json sharded.json

Half of the GPUs train, the others serve, tensor-parallel: of two 1 to 1, of four 2 to 2. Each case
is `weight_update.py` in a process of its own, which first compares what the engine stores with what
the trainer sent, to the bit. `push` and `busy` are over one flat broadcast of the whole model,
measured beside them. A line a case, as soon as it is known.

excerpts, in_place: nothing is decoded, so that busy is all that the update keeps the engine from.
excerpts, shadow: while requests decode; `stall` is the longest time between two steps' results.
broadcasts: the same by the other way, for comparison.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
import tyro
from machine import describe

HERE = Path(__file__).parent
CASES = [
    ("excerpts", "in_place", 0),
    ("excerpts", "shadow", 16),
    ("excerpts", "shadow", 0),
    ("excerpts", "undo", 0),
    ("broadcasts", "in_place", 0),
]
CASE_S = 150.0


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json."""
    gpus: int = 0
    """GPUs to use; 0 for all."""
    updates: int = 8
    """Updates to time in each case."""
    zero3: bool = False
    """Trainer ranks hold a module that DeepSpeed partitioned."""
    cases: int = len(CASES)
    """How many of the cases, from the first one on."""
    device: str = "auto"
    """'cpu' for a smoke test with two ranks on each side."""
    json: str | None = None
    """Write the figures to this file, anew after each case."""


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(options: Options, trainers: int, tp: int, case: tuple[str, str, int]) -> dict[str, Any]:
    """One case; its figures, or what it said when it failed."""
    way, mode, rows = case
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        words = ["--model", options.model, "--transport", "nccl", "--way", way, "--mode", mode]
        words += ["--trainers", str(trainers), "--tp", str(tp), "--rows", str(rows)]
        words += ["--updates", str(options.updates), "--check", "--json", str(figures)]
        words += ["--zero3"] if options.zero3 else []
        words += ["--device", "cpu"] if options.device == "cpu" else []
        command = [sys.executable, str(HERE / "weight_update.py"), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=CASE_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            return {"failed": f"no end within {CASE_S:g} s: {(error.stderr or b'')[-3000:]!r}"}
        if done.returncode or not figures.exists():
            return {"failed": (done.stdout + done.stderr)[-3000:]}
        found: dict[str, Any] = json.loads(figures.read_text())
        return found


def line_of(found: dict[str, Any]) -> str:
    """The figures of a case that matter most."""
    if "failed" in found:
        return f"FAILED\n{found['failed']}"
    stall = "" if found["stall_s"] is None else f"; stall {1e3 * found['stall_s']:.2f} ms"
    commands = ", ".join(f"{name} {1e3 * spent:.2f}" for name, spent in found["commands"])
    return (
        f"broadcast {1e3 * found['floor_s']:.2f} ms; push {1e3 * found['push_s']:.2f} ms "
        f"({found['push_over_floor']:.3f}x); busy {1e3 * found['busy_s']:.2f} ms "
        f"({found['busy_over_floor']:.3f}x){stall}; first push "
        f"{1e3 * found['first_push_s']:.0f} ms\n    {commands}"
    )


def main() -> int:
    """Measure and print; 1 if a case failed."""
    options = tyro.cli(Options)
    num_gpus = options.gpus or torch.cuda.device_count()
    trainers, tp = (2, 2) if options.device == "cpu" else (num_gpus // 2, num_gpus - num_gpus // 2)
    if trainers < 1:
        say("two GPUs are needed, or --device cpu")
        return 1
    tp = 1 << (tp.bit_length() - 1)
    say(f"{Path(options.model).stem}: {trainers} trainer rank(s) to TP {tp} on {describe()}")
    report: dict[str, Any] = {"machine": describe(), "torch": torch.__version__, "cases": []}
    for case in CASES[: options.cases]:
        started = time.monotonic()
        found = run(options, trainers, tp, case)
        way, mode, rows = case
        say(f"  {way}, {mode}, {rows} rows: {line_of(found)} [{time.monotonic() - started:.0f} s]")
        report["cases"].append({"way": way, "mode": mode, "rows": rows, **found})
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(any("failed" in case for case in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
