"""Products of few rows: shapes, candidate configurations, timing and tuning.

R rows, I input features, O output features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import checkout  # noqa: F401
import torch

from kernels.linear import Options, new_counters
from kernels.linear.plan import Config, Gemv, Tiles, choose
from kernels.linear.triton import with_config

DTYPE = torch.bfloat16
COLD_BYTES = 160 << 20
"""Weights to go round before one is read again: three times the L2 cache of an H100."""


@dataclass(frozen=True)
class Shape:
    """One product of a decoder layer, with what is fused to it."""

    name: str
    outs: int
    ins: int
    bias: bool = False
    norm: bool = False
    gated: bool = False
    residual: bool = False

    @property
    def features(self) -> int:
        return self.outs * (2 if self.gated else 1)

    @property
    def bytes(self) -> int:
        return self.features * self.ins * 2


SHAPES = [
    Shape("1.5B qkv", 2048, 1536, bias=True, norm=True),
    Shape("1.5B o", 1536, 1536, residual=True),
    Shape("1.5B gate_up", 8960, 1536, norm=True, gated=True),
    Shape("1.5B down", 1536, 8960, residual=True),
    Shape("1.5B head", 151936, 1536),
    Shape("8B qkv", 6144, 4096, norm=True),
    Shape("8B o", 4096, 4096, residual=True),
    Shape("8B gate_up", 12288, 4096, norm=True, gated=True),
    Shape("8B down", 4096, 12288, residual=True),
    Shape("8B head", 151936, 4096),
]
SHARDS = [
    shape
    for ranks in (2, 4)
    for shape in (
        Shape(f"8B/{ranks} qkv", 6144 // ranks, 4096),
        Shape(f"8B/{ranks} o", 4096, 4096 // ranks),
        Shape(f"8B/{ranks} gate_up", 12288 // ranks, 4096, gated=True),
        Shape(f"8B/{ranks} down", 4096, 12288 // ranks),
        Shape(f"8B/{ranks} head", 151936 // ranks, 4096),
    )
]
"""What one of 2 or of 4 ranks holds: norms and residuals are those of the sum over ranks."""
MODELS = ("1.5B", "8B", "8B/2", "8B/4")


def shapes_of(models: Sequence[str]) -> list[Shape]:
    """The shapes of `MODELS`."""
    return [shape for shape in (*SHAPES, *SHARDS) if shape.name.split()[0] in models]


Best = dict[tuple[str, bool], Config | None]
"""The configuration by shape and whether there is one row only."""


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    microseconds = time_us([lambda: target.copy_(source)] * 10)
    return 2 * source.numel() / microseconds * 1e6


def time_us(calls: Sequence[Callable[[], Any]], replays: int = 3) -> float:
    """Microseconds of one call, the calls captured one after another; best of the replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return min(times)


def pick(best: Best, shape: Shape, rows: int) -> Config | None:
    """The tuned configuration, else the one that the engine would use."""
    key = (shape.name, rows == 1)
    if key in best:
        return best[key]
    return choose(rows, shape.outs, shape.ins, gated=shape.gated, can_split=True)


class Case:
    """Tensors of one shape: rows, and enough weights that none stays in the cache."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        copies = max(1, min(32, COLD_BYTES // shape.bytes))
        scale = shape.ins**-0.5
        self.weights = [
            torch.randn(shape.features, shape.ins, device="cuda", dtype=DTYPE) * scale
            for _ in range(copies)
        ]
        self.x = torch.randn(16, shape.ins, device="cuda", dtype=DTYPE)
        self.residual = torch.randn(16, shape.outs, device="cuda", dtype=DTYPE)
        bias = torch.randn(shape.features, device="cuda", dtype=DTYPE)
        norm = torch.rand(shape.ins, device="cuda", dtype=DTYPE) + 0.5
        self.options = Options(
            bias_O=bias if shape.bias else None,
            norm_weight_I=norm if shape.norm else None,
            eps=1e-6,
            gated=shape.gated,
            counters=new_counters(torch.device("cuda")),
        )

    def run(self, rows: int, weight: torch.Tensor, config: Config | None) -> torch.Tensor:
        """The product with its surroundings; None runs cuBLAS and separate kernels."""
        residual = self.residual[:rows] if self.shape.residual else None
        options = replace(self.options, residual_RO=residual)
        return with_config(self.x[:rows], weight, options, config)

    def us(self, rows: int, config: Config | None) -> float:
        """Microseconds with a cold cache."""
        calls = [lambda w=weight: self.run(rows, w, config) for weight in self.weights]
        repeats = max(1, 16 // len(calls))
        return time_us(calls * repeats)

    def plain_us(self, rows: int) -> float:
        """Microseconds of cuBLAS alone, without what surrounds the product."""
        bias, x = self.options.bias_O, self.x[:rows]
        calls = [lambda w=weight: torch.nn.functional.linear(x, w, bias) for weight in self.weights]
        return time_us(calls * max(1, 16 // len(calls)))


def gemv_candidates(shape: Shape) -> Iterator[Gemv]:
    """Configurations for one row."""
    for warps in (1, 2, 4):
        passes = -(-shape.ins // (256 * warps))
        longest = max(d for d in range(1, 9) if passes % d == 0 or d == min(4, passes))
        modes = {(1, 1), (3, 1), (1, min(2, passes)), (1, longest)}
        for block_o in (1, 2, 4, 8):
            if not (shape.gated and block_o == 8):
                for stages, unroll in sorted(modes):
                    yield Gemv(block_o, warps, stages, unroll)


def tiles_candidates(shape: Shape) -> Iterator[Tiles]:
    """Configurations for up to 16 rows that fill the GPU and fit its shared memory."""
    for block_o, warps in ((16, 2), (32, 4), (64, 4), (128, 4)):
        for block_i in (64, 128, 256):
            for splits in (1, 2, 4, 8) if not shape.gated else (1,):
                for stages in (3, 5):
                    programs = -(-shape.outs // block_o) * splits
                    stage = (block_o * (2 if shape.gated else 1) + 16) * block_i * 2
                    crowded = programs > 800 and block_o < 128
                    if programs >= 90 and not crowded and 24 << 10 <= stage * stages <= 200 << 10:
                        yield Tiles(block_o, block_i, warps, stages, splits)


def candidates(shape: Shape, one_row: bool) -> list[Config]:
    """All configurations worth a try."""
    return list(gemv_candidates(shape) if one_row else tiles_candidates(shape))


def tune(best: Best, bandwidth: float, models: Sequence[str]) -> list[dict[str, Any]]:
    """Fill `best`, print the leaders of each shape; cuBLAS (None) may win."""
    rows_out = []
    for shape in shapes_of(models):
        case = Case(shape)
        for one_row, rows in ((True, 1), (False, 8)):
            timed = _timed(case, rows, [None, *candidates(shape, one_row)])
            best[shape.name, one_row] = timed[0][1]
            floor = shape.bytes / bandwidth * 1e6
            print(f"{shape.name:<14} rows {rows:<3} floor {floor:7.1f}", end="")
            print(f"  cuBLAS alone {case.plain_us(rows):7.1f}", flush=True)
            for microseconds, config in timed[:4]:
                print(f"    {microseconds:7.1f}  {config}", flush=True)
            rows_out.append({"shape": shape.name, "rows": rows, "floor_us": floor, "best": []})
            rows_out[-1]["best"] = [[us, repr(config)] for us, config in timed[:8]]
    return rows_out


def _timed(
    case: Case, rows: int, configs: Sequence[Config | None]
) -> list[tuple[float, Config | None]]:
    timed: list[tuple[float, Config | None]] = []
    for config in configs:
        try:
            timed.append((case.us(rows, config), config))
        except Exception as error:  # one configuration may not fit: the others count
            print(f"    {case.shape.name} {config}: {type(error).__name__} {str(error)[:80]}")
    return sorted(timed, key=lambda item: item[0])


def table(best: Best, bandwidth: float, models: Sequence[str]) -> list[dict[str, Any]]:
    """Ours, cuBLAS with separate kernels, cuBLAS alone, the floor."""
    out = []
    print(f"{'shape':<14}{'rows':>5}{'ours':>9}{'separate':>10}{'cuBLAS':>9}{'floor':>8}")
    for shape in shapes_of(models):
        case = Case(shape)
        for rows in (1, 2, 4, 8, 16):
            config = pick(best, shape, rows)
            times = {
                "ours": case.us(rows, config),
                "separate": case.us(rows, None),
                "cublas": case.plain_us(rows),
                "floor": shape.bytes / bandwidth * 1e6,
            }
            print(f"{shape.name:<14}{rows:>5}" + "".join(f"{us:9.1f}" for us in times.values()))
            out.append({"shape": shape.name, "rows": rows, "config": repr(config), **times})
    return out


def _warm(index: int, count: int, models: Sequence[str]) -> None:
    """Compile every `count`-th configuration by running it once."""
    turn = 0
    for shape in shapes_of(models):
        x = torch.zeros(16, shape.ins, device="cuda", dtype=DTYPE)
        case = None
        for one_row, rows in ((True, 1), (False, 8)):
            for config in candidates(shape, one_row):
                turn += 1
                if turn % count == index:
                    case = case or _uncopied(shape)
                    _timed_once(case, rows, x, config)


def _uncopied(shape: Shape) -> Case:
    case = Case.__new__(Case)
    case.shape = shape
    vector = torch.zeros(shape.features, device="cuda", dtype=DTYPE)
    case.options = Options(
        bias_O=vector if shape.bias else None,
        norm_weight_I=torch.zeros(shape.ins, device="cuda", dtype=DTYPE) if shape.norm else None,
        eps=1e-6,
        gated=shape.gated,
        counters=new_counters(torch.device("cuda")),
    )
    case.residual = torch.zeros(16, shape.outs, device="cuda", dtype=DTYPE)
    case.weights = [torch.zeros(shape.features, shape.ins, device="cuda", dtype=DTYPE)]
    return case


def _timed_once(case: Case, rows: int, x: torch.Tensor, config: Config) -> None:
    case.x = x
    try:
        case.run(rows, case.weights[0], config)
        torch.cuda.synchronize()
    except Exception as error:  # reported when it is timed
        print(f"warm {case.shape.name} {config}: {type(error).__name__}")


if __name__ == "__main__":
    _warm(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
