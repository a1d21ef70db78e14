"""Time sampling on a GPU: `python benchmarks/sampling.py [--tune] [--json FILE]`.

Checks come first (benchmarks/sampling_correct.py). Then, for 1 to 1,024 rows of 151,936
bfloat16 logits, microseconds inside a CUDA graph of a draw by temperature only, with entropy,
with each filter and with a tenth of the rows filtered; beside them the time the logits take at
the measured copy bandwidth, and the torch reference, which waits for the host and so is timed
outside a graph. `flat` logits are normal with deviation 1: a nucleus of 0.95 holds three
quarters of the vocabulary. `wide` ones have deviation 4: some thousands of tokens, in nearly
every chunk. `peaked` ones have deviation 2 and 64 tokens raised by 8 to 16, as a language model
has them: some dozens of tokens.

--tune: chunks and warps of a program, tried one by one. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import checkout  # noqa: F401
import torch
from machine import describe
from sampling_correct import VOCAB, checks

from kernels.bench import time_us
from kernels.sampling import sample

ROWS = (1, 64, 256, 1024)
KINDS = ("flat", "wide", "peaked")
CASES = ("plain", "entropy", "greedy", "top_k=50", "top_p=0.95", "min_p=0.05", "all", "mixed 10%")


def copy_gb_per_s() -> float:
    """Bytes moved a second by a copy of 2 GB, read and write counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_us(lambda: target.copy_(source), graph=True) / 1e3


def logits_of(kind: str, rows: int) -> torch.Tensor:
    """Random bfloat16 logits [rows, VOCAB]."""
    deviation = {"flat": 1.0, "wide": 4.0, "peaked": 2.0}[kind]
    logits = torch.randn(rows, VOCAB, device="cuda") * deviation
    if kind == "peaked":
        logits[:, torch.randperm(VOCAB, device="cuda")[:64]] += torch.linspace(8, 16, 64).cuda()
    return logits.bfloat16()


def draws(case: str, rows: int, kind: str) -> Callable[[str], Callable[[], Any]]:
    """The call of a case by back end."""
    logits = logits_of(kind, rows)
    temperature = torch.full((rows,), 0.0 if case == "greedy" else 1.0, device="cuda")
    seed, position = torch.randint(2**60, (2, rows), device="cuda")
    options = _options(case, rows)

    def of(backend: str) -> Callable[[], Any]:
        return lambda: sample(logits, temperature, seed, position, **options, backend=backend)

    return of


def _options(case: str, rows: int) -> dict[str, torch.Tensor]:
    if case in ("plain", "greedy"):
        return {}
    if case == "entropy":
        return {"entropy_S": torch.empty(rows, device="cuda")}
    if case == "top_k=50":
        return {"top_k_S": torch.full((rows,), 50, device="cuda")}
    if case == "top_p=0.95":
        return {"top_p_S": torch.full((rows,), 0.95, device="cuda")}
    if case == "min_p=0.05":
        return {"min_p_S": torch.full((rows,), 0.05, device="cuda")}
    used = torch.arange(rows, device="cuda") % (10 if case == "mixed 10%" else 1) == 0
    return {
        "top_k_S": torch.where(used, 50, -1),
        "top_p_S": torch.where(used, 0.95, 1.0),
        "min_p_S": torch.where(used, 0.05, 0.0),
    }


def measure(rate: float) -> Iterator[dict[str, Any]]:
    """One row of the table a case."""
    for kind, rows, case in product(KINDS, ROWS, CASES):
        of = draws(case, rows, kind)
        triton_us = time_us(of("triton"), graph=True)
        torch_us = time_us(of("torch"), graph=False)
        floor_us = rows * VOCAB * 2 / rate / 1e3
        found = {"logits": kind, "rows": rows, "case": case, "us": triton_us}
        yield {**found, "floor_us": floor_us, "torch_us": torch_us}


def tune() -> Iterator[tuple[str, float]]:
    """(setting, microseconds) of the two kernels that read the vocabulary."""
    for rows, (chunks, warps) in product((64, 1024), product((4, 8, 16, 32), (2, 4, 8))):
        settings = {"CHUNKS_PER_PROGRAM": chunks, "CHUNK_WARPS": warps}
        yield _tuned(f"plain, {rows} rows", settings, draws("plain", rows, "flat"))
    cases = (("top_p=0.95", "flat"), ("top_p=0.95", "peaked"), ("top_k=50", "peaked"))
    filtered = product(cases, (1, 256))
    for ((case, kind), rows), (chunks, warps) in product(
        filtered, ((8, 8), (16, 8), (8, 16), (16, 16), (32, 16), (16, 4), (4, 4))
    ):
        settings = {"FILTER_CHUNKS": chunks, "FILTER_WARPS": warps}
        yield _tuned(f"{case}, {kind}, {rows} rows", settings, draws(case, rows, kind))


def _tuned(
    name: str, settings: dict[str, int], of: Callable[[str], Callable[[], Any]]
) -> tuple[str, float]:
    from kernels.sampling import triton

    with mock.patch.multiple(triton, **settings):
        return f"{name}: {settings}", time_us(of("triton"), graph=True)


def _check() -> int:
    failures = 0
    for name, check in checks():
        try:
            sys.stdout.write(f"ok    {name}: {check()}\n")
        except Exception:
            failures += 1
            sys.stdout.write(f"FAIL  {name}\n{traceback.format_exc()}\n")
    return failures


def _show(rate: float) -> list[dict[str, Any]]:
    sys.stdout.write(f"{'logits':<8}{'rows':>6} {'case':<12}")
    sys.stdout.write(f"{'us':>9}{'floor':>9}{'torch':>10}{'ratio':>8}\n")
    rows = []
    for found in measure(rate):
        ratio = found["torch_us"] / found["us"]
        sys.stdout.write(f"{found['logits']:<8}{found['rows']:>6} {found['case']:<12}")
        sys.stdout.write(f"{found['us']:>9.1f}{found['floor_us']:>9.1f}")
        sys.stdout.write(f"{found['torch_us']:>10.1f}{ratio:>8.1f}\n")
        sys.stdout.flush()
        rows.append(found)
    return rows


def main() -> int:
    """Run the parts; a part that fails does not stop the next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--tune", action="store_true", help="try chunks and warps of a program")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed; torch sees none")
    torch.manual_seed(0)
    failures = _check()
    rate, rows = copy_gb_per_s(), []
    sys.stdout.write(f"{describe()}, torch {torch.__version__}, copies {rate:.0f} GB/s\n")
    try:
        rows = _show(rate)
        if args.tune:
            for name, us in tune():
                sys.stdout.write(f"{us:>9.1f}  {name}\n")
    except Exception:
        failures += 1
        sys.stdout.write(traceback.format_exc())
    if args.json:
        machine = {"machine": describe(), "torch": torch.__version__, "copy_gb_per_s": rate}
        args.json.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
