"""Products of int8 rows on a GPU: `python benchmarks/int8_linear.py [--tune] [--json FILE]`.

First checks, on odd shapes and those of an 8B model: scales, integers and products have the bits
of the torch reference, alone and in a batch, by every kernel that takes the shape. Then times,
inside a CUDA graph and with weights that no cache holds: each product of a layer at 1 to 1,024 rows
in bfloat16 (the engine's kernel or cuBLAS) and in int8, with what surrounds it: norm, bias, gate or
residual, and quantising the rows. The int8 column is what the plan chooses; with --tune every
candidate runs and the fastest are printed, by which `kernels/int8_linear/plan.py` is set. The last
table adds up a layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from machine import describe
from small_kernels_products import Shape, time_us

from kernels.int8_linear.plan import Config, Gemm, Tiles, Vendor, choose, fits_vendor
from kernels.int8_linear.reference import int8_linear as reference
from kernels.int8_linear.triton import int8_linear, with_config
from kernels.linear import Options, fused_linear, new_counters
from kernels.quant.rows import quantize_rows

ROWS = (1, 4, 16, 64, 256, 1024)
SHAPES = [
    Shape("8B qkv", 6144, 4096, norm=True),
    Shape("8B o", 4096, 4096, residual=True),
    Shape("8B gate_up", 12288, 4096, norm=True, gated=True),
    Shape("8B down", 4096, 12288, residual=True),
]
ODD = [
    Shape("odd", 100, 63, bias=True),
    Shape("narrow", 136, 1000, bias=True, residual=True),
    Shape("one", 1, 32),
]
COLD_BYTES = 160 << 20


def candidates(shape: Shape, rows: int) -> Iterator[Config]:
    """Every configuration that is tried for a shape."""
    if rows <= 16:
        for block_o in (32, 64, 128):
            for block_i in (128, 256, 512):
                for stages in (2, 3, 4, 5):
                    for warps in (4, 8):
                        for splits in (1,) if shape.gated else (1, 2, 3, 4, 6, 8):
                            passes = -(-shape.ins // block_i)
                            # What a program has in shared memory at once.
                            used = stages * block_i * (block_o * (2 if shape.gated else 1) + 16)
                            if passes % splits == 0 and used <= 220 << 10:
                                yield Tiles(block_o, block_i, warps, stages, splits)
        return
    for block_r, block_o, warps in (
        (32, 64, 4),
        (32, 128, 4),
        (64, 64, 4),
        (64, 128, 4),
        (64, 256, 8),
        (128, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
        (256, 128, 8),
    ):
        for block_i in (64, 128, 256):
            for stages in (3, 4):
                if block_r <= 2 * rows and stages * block_i * (block_r + block_o) <= 220 << 10:
                    yield Gemm(block_r, block_o, block_i, warps, stages)
    if fits_vendor(rows, shape.features, shape.ins):
        yield Vendor()


class Case:
    """Tensors of one shape, and enough weights that none stays in the cache."""

    def __init__(self, shape: Shape, most_rows: int, *, cold: bool = True) -> None:
        self.shape = shape
        copies = max(1, min(16, COLD_BYTES // (shape.features * shape.ins))) if cold else 1
        generator = torch.Generator(device="cuda").manual_seed(0)

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(size, device="cuda", generator=generator).bfloat16()

        self.plain = [drawn(shape.features, shape.ins) * shape.ins**-0.5 for _ in range(copies)]
        self.int8 = [quantize_rows(weight, backend="triton") for weight in self.plain]
        self.x = drawn(most_rows, shape.ins)
        self.residual = drawn(most_rows, shape.outs) if shape.residual else None
        self.options = Options(
            bias_O=drawn(shape.features) if shape.bias else None,
            norm_weight_I=drawn(shape.ins).abs() + 0.5 if shape.norm else None,
            eps=1e-6,
            gated=shape.gated,
            counters=new_counters(torch.device("cuda")),
        )

    def around(self, rows: int) -> Options:
        """The options for so many rows."""
        residual = None if self.residual is None else self.residual[:rows]
        return replace(self.options, residual_RO=residual)

    def plain_us(self, rows: int) -> float:
        """Microseconds in bfloat16, as the engine computes it."""
        x, options = self.x[:rows], self.around(rows)
        return self._us(
            [lambda w=w: fused_linear(x, w, options, backend="triton") for w in self.plain]
        )

    def int8_us(self, rows: int, config: Config | None = None) -> float:
        """Microseconds in int8, by the plan or by a configuration."""
        x, options = self.x[:rows], self.around(rows)
        if config is None:
            calls = [lambda w=w, s=s: int8_linear(x, w, s, options) for w, s in self.int8]
        else:
            calls = [lambda w=w, s=s: with_config(x, w, s, options, config) for w, s in self.int8]
        return self._us(calls)

    def quantize_us(self, rows: int) -> float:
        """Microseconds of making the rows int8, the norm included."""
        norm, x = self.options.norm_weight_I, self.x[:rows]
        call = lambda: quantize_rows(x, backend="triton", norm_weight_I=norm, eps=1e-6)  # noqa: E731
        return self._us([call])

    def _us(self, calls: list[Callable[[], Any]]) -> float:
        return time_us(calls * max(1, 16 // len(calls)))


def check() -> list[str]:
    """What differs from the reference."""
    wrong: list[str] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(37, 4097, device="cuda").to(dtype)
        x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
        got, want = quantize_rows(x, backend="triton"), quantize_rows(x.cpu(), backend="torch")
        same = torch.equal(got[0].cpu(), want[0]) and torch.equal(
            got[1].cpu().nan_to_num(-1), want[1].nan_to_num(-1)
        )
        wrong += [] if same else [f"quantize_rows {dtype}"]
    for shape in ODD + SHAPES:
        case = Case(shape, 300, cold=False)
        for rows in (1, 2, 3, 16, 17, 64, 65, 300):
            wrong += check_rows(case, rows)
    return wrong


def check_rows(case: Case, rows: int) -> list[str]:
    """The same for one number of rows; norm and gate are left out, which round otherwise."""
    shape = case.shape
    options = replace(case.around(rows), norm_weight_I=None, gated=False)
    if shape.gated:
        options = replace(options, residual_RO=None)
    x, (weight, scale) = case.x[:rows], case.int8[0]
    want = reference(x, weight, scale, options)
    plain = replace(shape, outs=shape.features, gated=False)
    configs = [choose(rows, plain.outs, plain.ins, gated=False, can_split=True)]
    if rows > 16:
        configs += [Gemm(64, 64, 128, 4, 4), Gemm(128, 128, 128, 8, 3)]
        configs += [Vendor()] if fits_vendor(rows, plain.outs, plain.ins) else []
    wrong = []
    for config in configs:
        got = with_config(x, weight, scale, options, config)
        if not torch.equal(got, want):
            at = (got != want).nonzero()[0].tolist()
            wrong.append(f"{shape.name}, {rows} rows, {config}: first at {at}")
    if options.counters is not None and options.counters.any():
        wrong.append(f"{shape.name}, {rows} rows: counters are left")
    alone = int8_linear(x[-1:], weight, scale, replace(options, residual_RO=None))
    batch = int8_linear(x, weight, scale, replace(options, residual_RO=None))
    if not torch.equal(alone[0], batch[-1]):
        wrong.append(f"{shape.name}, {rows} rows: a row alone differs")
    return wrong


def measure(shape: Shape, *, tune: bool) -> Iterator[dict[str, Any]]:
    """Microseconds by rows."""
    case = Case(shape, max(ROWS))
    for rows in ROWS:
        row = {
            "shape": shape.name,
            "rows": rows,
            "bf16_us": case.plain_us(rows),
            "int8_us": case.int8_us(rows),
            "quantize_us": case.quantize_us(rows),
        }
        if tune:
            row["candidates"] = tried(case, rows)
        yield row


def tried(case: Case, rows: int) -> list[tuple[float, str]]:
    """(microseconds, configuration) of all candidates, the fastest first."""
    found = []
    for config in candidates(case.shape, rows):
        try:
            found.append((case.int8_us(rows, config), str(config)))
        except Exception as error:
            # One that the compiler or the device refuses is none.
            found.append((float("inf"), f"{config}: {type(error).__name__}"))
    return sorted(found)


def show(row: dict[str, Any], shape: Shape) -> None:
    """One line, and the best candidates."""
    bandwidth = shape.features * shape.ins / row["int8_us"] * 1e-3
    print(
        f"{row['shape']:<12}{row['rows']:>6}{row['bf16_us']:>10.1f}{row['int8_us']:>10.1f}"
        f"{row['bf16_us'] / row['int8_us']:>8.2f}{row['quantize_us']:>10.1f}{bandwidth:>10.0f}"
    )
    for us, config in row.get("candidates", [])[:4]:
        print(f"    {us:8.1f}  {config}")
    vendor = [us for us, config in row.get("candidates", []) if config.startswith("Vendor")]
    if vendor:
        print(f"    {vendor[0]:8.1f}  Vendor()")


def main() -> int:
    """Check, then print the tables; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try every candidate")
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--json", type=Path, help="write the tables here")
    args = parser.parse_args()
    print(f"{describe()}, torch {torch.__version__}")
    wrong = check()
    print("\n".join(["differs:", *wrong]) if wrong else "all bits are those of the reference")
    rows: list[dict[str, Any]] = []
    if not args.check_only:
        columns = ("bf16 us", "int8 us", "ratio", "quantize", "GB/s")
        print(f"{'product':<12}{'rows':>6}{columns[0]:>10}{columns[1]:>10}{columns[2]:>8}", end="")
        print(f"{columns[3]:>10}{columns[4]:>10}")
        for shape in SHAPES:
            for row in measure(shape, tune=args.tune):
                show(row, shape)
                rows.append(row)
        for count in ROWS:
            sums = [sum(r[k] for r in rows if r["rows"] == count) for k in ("bf16_us", "int8_us")]
            ratio = sums[0] / sums[1]
            print(f"{'a layer':<12}{count:>6}{sums[0]:>10.1f}{sums[1]:>10.1f}{ratio:>8.2f}")
    if args.json:
        found = {"machine": describe(), "torch": torch.__version__, "wrong": wrong, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
