"""Decode attention on a GPU: plain against grouped, over the shapes of rollouts.

    python benchmarks/attention_decode.py [--parts equal times launches whole rule] [--json FILE]

equal: every way of computing a row is compared bit by bit, on random KV, and with a float64
reference. times: each is timed as a graph of calls that go round the layers of a pool larger than
the cache; the floor reads every shared page once and every other page once, at the copy bandwidth
measured in the same run. launches, whole, rule: see `attention_decode_tune.py`. Exit status 1 if
any part failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import torch
import tyro
from attention_decode_cases import (
    LARGE,
    MIDDLE,
    SMALL,
    TIMED,
    TINY,
    Bench,
    Case,
    Model,
    copy_gb_per_s,
    on_device,
    time_us,
)
from attention_decode_tune import (
    LAUNCHES,
    attempt,
    compile_all,
    tune_launches,
    tune_rule,
    tune_whole,
)

from engine.config import KVDType
from kernels.attention import reference
from kernels.attention.grouped import Launch, choose_launch


@dataclass(frozen=True)
class Options:
    """What to run."""

    parts: tuple[Literal["equal", "times", "launches", "whole", "rule"], ...] = ("equal", "times")
    """Parts, in order."""
    kv_dtype: KVDType = "auto"
    """What keys and values are kept as."""
    json: str | None = None
    """Write the figures to this file."""


# What to compare bit by bit: odd lengths, lone rows between, groups of more than one tile.
EQUAL = [
    Case(SMALL, 5, 16, 512, 77, loners=3),
    Case(SMALL, 3, 37, 384, 500),
    Case(LARGE, 4, 16, 256, 130, loners=1),
    Case(MIDDLE, 3, 8, 1024, 1),
    Case(TINY, 3, 16, 640, 63),
    Case(Model("64 heads", 64, 4), 2, 16, 256, 40),
    Case(SMALL, 2, 5, 3968, 100),
]


def check_equal(options: Options) -> list[dict[str, Any]]:
    rows = []
    for case in EQUAL:
        bench = Bench(case, 1, options.kv_dtype)
        want = bench.result(partial(bench.plain, whole=True))
        found = {"splits": bench.result(partial(bench.plain, whole=False))}
        launches = [*LAUNCHES, None] if "launches" in options.parts else [None]
        for launch in launches:
            if launch is None or launch.height >= case.model.heads // case.model.kv_heads:
                run = partial(bench.grouped, launch=launch)
                found[name(launch, case, options.kv_dtype)] = attempt(partial(bench.result, run))
        error = float_error(bench, want)
        for way, got in found.items():
            wrong = -1 if got is None else int((got != want).sum())
            rows.append({"case": str(case), "way": way, "differ": wrong, "error": error})
            print(f"{case!s:<28}{way:<16}{wrong:>8} of {want.numel()} differ, error {error:.1e}")
    return rows


def float_error(bench: Bench, got: torch.Tensor) -> float:
    """Greatest difference from attention in float64 over a few rows."""
    rows = torch.tensor([0, bench.case.rows - 1], device="cuda")
    length, u = bench.case.shared + bench.case.own, bench.case.model.heads
    u //= bench.case.model.kv_heads
    worst = 0.0
    for row in rows.tolist():
        scales = bench.scales[0] or (None, None)
        k, v = (
            reference.gather_row(pages[0], bench.table[row], length, scale)
            for pages, scale in zip((bench.k, bench.v), scales, strict=True)
        )
        k, v = (x.double().repeat_interleave(u, 1) for x in (k, v))
        scores = torch.einsum("hd,shd->hs", bench.q[row].double(), k) * k.shape[-1] ** -0.5
        want = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
        worst = max(worst, float((got[row].double() - want).abs().max()))
    return worst


def name(launch: Launch | None, case: Case, kv_dtype: KVDType) -> str:
    if launch is None:
        group, scaled = case.model.heads // case.model.kv_heads, kv_dtype != "auto"
        launch = choose_launch(group, wide=False, scaled=scaled)
        return f"grouped {launch.height}/{launch.num_warps}/{launch.num_stages}*"
    return f"grouped {launch.height}/{launch.num_warps}/{launch.num_stages}"


def time_cases(options: Options) -> list[dict[str, Any]]:
    rate = copy_gb_per_s()
    print(f"copy {rate:.0f} GB/s; microseconds of a layer")
    print(f"{'case':<28}{'floor':>8}{'plain':>8}{'grouped':>9}{'shared':>8}{'rest':>8}{'gain':>7}")
    rows = []
    for case in TIMED:
        bench = on_device(case, options.kv_dtype)
        floor = case.kept_bytes(options.kv_dtype) / rate / 1e3
        plain = time_us(bench.plain, bench.layers)
        grouped = time_us(bench.grouped, bench.layers)
        shared = time_us(bench.shared_part, bench.layers)
        row = {"case": str(case), "floor_us": floor, "plain_us": plain, "grouped_us": grouped}
        rows.append({**row, "shared_us": shared})
        print(
            f"{case!s:<28}{floor:>8.1f}{plain:>8.1f}{grouped:>9.1f}{shared:>8.1f}"
            f"{grouped - shared:>8.1f}{plain / grouped:>7.2f}"
        )
        del bench
    return rows


PARTS = {
    "equal": check_equal,
    "times": time_cases,
    "launches": lambda options: tune_launches(options.kv_dtype),
    "whole": lambda options: tune_whole(options.kv_dtype),
    "rule": lambda options: tune_rule(options.kv_dtype),
}


def main(options: Options) -> int:
    """Run the parts; one that fails does not keep the next from running."""
    if not torch.cuda.is_available():
        print("decode attention is timed on a CUDA GPU; torch sees none")
        return 1
    sys.stdout.reconfigure(line_buffering=True)
    figures: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kv_dtype": options.kv_dtype,
        "unit": "us a layer",
    }
    if "launches" in options.parts:
        compile_all(options.kv_dtype)
    failed = 0
    for part in options.parts:
        print(f"-- {part}")
        try:
            figures[part] = PARTS[part](options)
        except Exception:
            traceback.print_exc()
            failed = 1
        torch.cuda.empty_cache()
        if options.json is not None:
            Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    equal = all(row["differ"] == 0 for row in figures.get("equal", []))
    print("every way bit-equal" if equal else "SOME WAYS DIFFER")
    return failed or int(not equal and "launches" not in options.parts)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
