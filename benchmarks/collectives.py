"""Collectives between GPUs: bits, races and faults, then times beside NCCL and torch.

    python benchmarks/collectives.py --gpus 2 --json results.json
    python benchmarks/collectives.py --gpus 2 --parts tune

It starts a process a GPU itself. Parts, in order; one that fails is reported and the others run:
bits: every op against its reference, with torch.equal, for shapes, dtypes and lengths in
turn; stress: a graph of ops of all kinds, replayed with delays between the ranks that differ from
replay to replay, every result checked on the device; abort: a rank that does not come, and the
waits of the others are given up; time: microseconds of each op, captured 100 times in a graph;
tune: the same for every cut into programs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import checkout
import torch
import tyro
from machine import describe

_RANK = Path(__file__).with_name("collectives_rank.py")
Part = Literal["bits", "stress", "abort", "time", "tune"]


@dataclass(frozen=True)
class Options:
    """What to do."""

    gpus: int = 0
    """How many GPUs; 0 for all."""
    parts: tuple[Part, ...] = ("bits", "stress", "time", "abort")
    """In order; "abort" has to be the last."""
    rows: tuple[int, ...] = (1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Rows of the times."""
    width: int = 4096
    """Of a row, in bfloat16."""
    replays: int = 2000
    """Of the stress."""
    deadline_s: float = 540.0
    """Of everything."""
    json: str | None = None
    """Write the figures to this file."""


def main() -> int:
    """Run the ranks and gather what rank 0 found."""
    options = tyro.cli(Options)
    gpus = options.gpus or torch.cuda.device_count()
    print(f"{describe()} x {gpus}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        place = str(Path(folder) / "meeting")
        jobs = [
            json.dumps({**asdict(options), "rank": rank, "gpus": gpus, "place": place})
            for rank in range(gpus)
        ]
        ranks = [
            subprocess.Popen([sys.executable, str(_RANK), job, str(out)], env=_environment())
            for job in jobs
        ]
        failed = _wait(ranks, options.deadline_s)
        results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if options.json:
        report = {
            "machine": describe(),
            "gpus": gpus,
            "torch": torch.__version__,
            "options": {k: v for k, v in asdict(options).items() if k != "json"},
            "results": results,
        }
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{failed + results.get('failed', 0)} failed", flush=True)
    return int(failed + results.get("failed", 0) > 0)


def _environment() -> dict[str, str]:
    # Also where torch's own kernels are timed: they shall map memory as ours do.
    return checkout.environment(PYTHONUNBUFFERED="1", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")


def _wait(ranks: list[subprocess.Popen[bytes]], deadline_s: float) -> int:
    """How many ranks ended by an error, or were ended at the deadline."""
    until = time.monotonic() + deadline_s
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            if any(rank.poll() for rank in ranks):
                until = min(until, time.monotonic() + 30.0)
            time.sleep(0.2)
    finally:
        for number, rank in enumerate(ranks):
            if rank.poll() is None:
                print(f"rank {number} has not ended in time", flush=True)
                rank.kill()
                rank.wait()
    return sum(rank.returncode != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
