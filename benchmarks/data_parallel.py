"""Several copies of a model behind one leader, on GPUs: agreement with one, faults, then tokens a
second.

    python benchmarks/data_parallel.py --model benchmarks/shapes/qwen2.5-1.5b.json

Every measurement is a process of its own with a deadline (`tensor_parallel_jobs.py`). Agreement:
greedy tokens of a small random model in float32 are those of one copy. Faults: the rank of another
copy is killed, or stopped, in the middle of graph replays, and the replica must end with an error
that names it. Speed: a workload on one copy; as many workloads as there are copies on all of them
(`scaled`), and the workload itself on all of them (`divided`), as ratios to the first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import torch
import tyro
from machine import describe
from tensor_parallel import SMALL, compare, run_job
from tensor_parallel_jobs import Job


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json, for the speed."""
    dp: int = 0
    """Copies; 0: as many as there are GPUs for."""
    tp: int = 1
    """Ranks of a copy."""
    parts: tuple[Literal["agreement", "faults", "speed"], ...] = ("agreement", "faults", "speed")
    """What to do, in order."""
    workload: Literal["group", "group8"] = "group"
    """Workload of the speed."""
    shorten: int = 4
    """Divide its lengths by this."""
    deadline_s: float = 240.0
    """Of one measurement."""
    device: Literal["auto", "cpu"] = "auto"
    """'cpu' for a smoke test with a small model."""
    json: str | None = None
    """Write the figures to this file."""


class Suite:
    """Runs the parts and keeps what they found."""

    def __init__(self, options: Options, small: str) -> None:
        self.options = options
        self.dp = options.dp or max(torch.cuda.device_count() // options.tp, 2)
        self.job = Job(part="", model=small, tp=options.tp, device=options.device)
        self.results: dict[str, Any] = {}
        self.failed: list[str] = []

    def take(self, title: str, **fields: Any) -> dict[str, Any] | None:
        """Run a job; print what it found, or its failure."""
        found = run_job(replace(self.job, **fields), self.options.deadline_s)
        if "failed" in found:
            self.keep(title, found, good=False)
            return None
        return found

    def keep(self, title: str, found: dict[str, Any], *, good: bool = True) -> None:
        """Print figures, at once, and note whether they are as they must be."""
        if not good:
            self.failed.append(title)
        self.results[title] = found
        print(f"{title}: {'' if good else 'WRONG '}{json.dumps(found)}", flush=True)

    def agreement(self) -> None:
        alone = self.take("agreement of one copy", part="agreement", dtype="float32")
        together = self.take(
            f"agreement of {self.dp} copies", part="agreement", dtype="float32", dp=self.dp
        )
        if alone and together:
            found = compare(alone, together)
            self.keep(f"{self.dp} copies to one", found, good=found["rows_equal"] == found["rows"])

    def faults(self) -> None:
        for name in ("killed", "stopped"):
            title = f"a rank {name}"
            if found := self.take(title, part="faults", name=name, dp=self.dp):
                named = "rank 1 (dp " in "".join(found["message"])
                self.keep(title, found, good=found["error"] == "EngineDead" and named)

    def speed(self) -> None:
        job = {
            "part": "speed",
            "name": self.options.workload,
            "model": self.options.model,
            "shorten": self.options.shorten,
        }
        runs = {"one": (1, 1), "scaled": (self.dp, self.dp), "divided": (self.dp, 1)}
        speeds: dict[str, float] = {}
        for title, (dp, times) in runs.items():
            if found := self.take(title, **job, dp=dp, times=times):
                speeds[title] = found["tokens_per_s"]
                found["over_one"] = speeds[title] / speeds.get("one", float("nan"))
                self.keep(title, found)


def main() -> int:
    """Measure and print."""
    options = tyro.cli(Options)
    print(f"{describe()} x {torch.cuda.device_count()}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "config.json"
        small.write_text(json.dumps(SMALL))
        suite = Suite(options, str(small))
        for part in options.parts:
            getattr(suite, part)()
            if options.json:
                report = {
                    "machine": describe(),
                    "gpus": torch.cuda.device_count(),
                    "torch": torch.__version__,
                    "options": {k: v for k, v in asdict(options).items() if k != "json"},
                    "results": suite.results,
                }
                Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(suite.failed)} failed {suite.failed}", flush=True)
    return int(bool(suite.failed))


if __name__ == "__main__":
    sys.exit(main())
