"""Time the small kernels of a decode step: fused ones against the chain they replace, products
of few rows against cuBLAS and the bandwidth, and what stands around a step that verifies drafts.

    python benchmarks/small_kernels.py [--parts correct fused products chain speculative] [--tune]
        [--models 1.5B 8B 8B/2 8B/4] [--json F]

Every time is microseconds of one call inside a CUDA graph of many, over enough copies of the
weights that none is found in the L2 cache. `chain` runs the layers of a decode step without
their attention: as separate kernels and fused.
`--models` are those of the products; "8B/2" is what one of two ranks holds.
`--tune` tries every configuration of the products first, and the later parts use the best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import small_kernels_chain as chain
import small_kernels_correct as correct
import small_kernels_products as products
import small_kernels_speculative as speculative
import torch
from machine import describe

PARTS = ("correct", "fused", "products", "chain", "speculative")
WARMERS = 14


def warm_compile_cache(models: Sequence[str]) -> None:
    """Compile all configurations in processes of their own: Triton's disk cache keeps them."""
    script = str(Path(__file__).with_name("small_kernels_products.py"))
    args = [[sys.executable, script, str(index), str(WARMERS), *models] for index in range(WARMERS)]
    running = [subprocess.Popen(command) for command in args]
    for process in running:
        process.wait(timeout=500)


def attempt(name: str, part: Callable[[], Any], report: dict[str, Any]) -> bool:
    """Run one part; a failure is printed and does not stop the others."""
    print(f"== {name}")
    started = time.perf_counter()
    try:
        report[name] = part()
    except Exception:  # a benchmark goes on to its next part
        traceback.print_exc(file=sys.stdout)
        return False
    print(f"[{name}: {time.perf_counter() - started:.1f} s]")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 1 if one failed or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--models", nargs="+", choices=products.MODELS, default=("1.5B", "8B"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("needs a CUDA GPU; torch sees none")
        return 1
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    bandwidth = products.copy_bandwidth()
    report: dict[str, Any] = {"machine": describe(), "torch": torch.__version__}
    report["copy_gb_per_s"] = bandwidth / 1e9
    print(f"{describe()}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s")
    best: products.Best = {}
    runs: dict[str, Callable[[], Any]] = {
        "correct": correct.run,
        "fused": chain.fused_kernels,
        "products": lambda: products.table(best, bandwidth, options.models),
        "chain": lambda: chain.table(best, bandwidth),
        "speculative": speculative.table,
    }
    order = [name for name in PARTS if name in options.parts]
    if options.tune:
        runs["warm"] = lambda: warm_compile_cache(options.models)
        runs["tune"] = lambda: products.tune(best, bandwidth, options.models)
        at = int("correct" in order)
        order[at:at] = ["warm", "tune"]
    fine = True
    for name in order:
        fine &= attempt(name, runs[name], report)
        if options.json:  # whatever stops a later part, this much is kept
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
