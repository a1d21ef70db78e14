"""Experts on a GPU: `python benchmarks/moe_kernels.py [--tune] [--check-only] [--json FILE]`.

First checks at 0 to 4,097 rows, evenly spread and skewed: results near those of the torch
reference, the same bits when repeated, when replayed from a graph, and beside rows that only fill
it. Then times of a layer, inside a CUDA graph, over batches of different tokens: the router; sort,
up, down and combine; torch's grouped product with what transformers puts around it; and the floor,
which is the weights of the experts that were hit over the memory's speed, or the products over the
tensor cores'. With --tune every candidate runs for every number of rows, and the fastest are
printed, by which `kernels/moe/plan.py` is set.
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
from moe_kernels_layer import BATCHES, SHAPES, Layer, Shape, Speed, check, speed_of
from small_kernels_products import time_us

from kernels.moe import Routed
from kernels.moe.plan import ByTile, Config, Gemv, Tile, choose
from kernels.moe.triton import products

ROWS = (1, 8, 16, 64, 256, 1024, 4096)
CHECKED_ROWS = (0, 1, 3, 4, 5, 16, 17, 128, 1024, 4097)
_MOST_SHARED = 227 << 10

Batch = tuple[torch.Tensor, Routed]


def batches(layer: Layer, rows: int) -> list[Batch]:
    """Tokens and where they go."""
    found = [layer.tokens(rows) for _ in range(BATCHES if rows <= 1024 else 4)]
    return [(x, layer.route(x)) for x in found]


def measure(layer: Layer, rows: int, speed: Speed) -> dict[str, Any]:
    """Microseconds of one number of rows."""
    some, shape = batches(layer, rows), layer.shape

    def us(call: Callable[..., Any]) -> float:
        return time_us([lambda batch=batch: call(*batch) for batch in some])

    whole = us(lambda x, _: layer.experts(x, layer.route(x)))
    floor = sum(layer.floor_us(routed, speed) for _, routed in some) / len(some)
    return {
        "shape": shape.name,
        "rows": rows,
        "hit": sum(layer.hit(routed) for _, routed in some) / len(some),
        "floor_us": floor,
        "route_us": us(lambda x, _: layer.route(x)),
        "experts_us": us(layer.experts),
        "layer_us": whole,
        "over_floor": whole / floor,
        # Torch's product takes ids of slots only.
        "grouped_us": us(layer.grouped) if shape.slots == shape.experts else None,
        "plan": str(choose(rows, shape.top_k, shape.experts, shape.hidden, shape.inner)),
    }


def candidates(shape: Shape, rows: int) -> Iterator[Config]:
    """What is tried: by pair or the plan's tiles, half and twice as many pairs; up beside the down
    of the plan, then down beside its up. A compilation takes seconds, so not everything is."""
    mean = rows * shape.top_k / shape.experts
    for block_p in (0, 16, 32, 64, 128):
        if (rows > 16) if block_p == 0 else not (block_p == 16 or mean / 2 < block_p < 4 * mean):
            continue
        planned = _planned(shape, block_p)
        for up in _halves(block_p, shape.hidden, gated=True):
            yield replace(planned, up=up)
        for down in _halves(block_p, shape.inner, gated=False):
            yield replace(planned, down=down)


def _planned(shape: Shape, block_p: int) -> Config:
    """The plan's configuration of one way; 0 is by pair."""
    for rows in (1, 5, *(1 << power for power in range(3, 20))):
        found = choose(rows, shape.top_k, shape.experts, shape.hidden, shape.inner)
        if block_p == (found.block_p if isinstance(found, ByTile) else 0):
            return found
    raise ValueError(f"no plan has tiles of {block_p} pairs")


def _halves(block_p: int, ins: int, *, gated: bool) -> Iterator[Any]:
    if block_p == 0:
        for block_o in (1, 2, 4, 8, 16):
            for warps in (1, 2, 4, 8):
                if 256 * warps <= 2 * ins:
                    yield Gemv(block_o, warps)
        return
    for features in (64, 128, 256):
        for block_i in (64, 128):
            for stages in (3, 4, 5):
                for warps in (4, 8):
                    shared = stages * 2 * block_i * (features + block_p)
                    # Sums of more than 128 registers a thread spill; fewer than 8 are idle warps.
                    sums = features * block_p // (32 * warps)
                    if block_i <= ins and shared <= _MOST_SHARED and 8 <= sums <= 128:
                        yield Tile(features // 2 if gated else features, block_i, warps, stages)


def tune(layer: Layer, rows: int) -> list[tuple[float, str]]:
    """(microseconds of sort, up and down, configuration) of all candidates, the fastest first."""
    some = batches(layer, rows)
    found = []
    for config in candidates(layer.shape, rows):

        def call(x: torch.Tensor, routed: Routed, config: Config = config) -> torch.Tensor:
            return products(x, layer.gate_up, layer.down, routed.ids_TK, 0, config)

        try:
            us = time_us([lambda batch=batch: call(*batch) for batch in some])
            found.append((us, str(config)))
        except Exception as error:
            # One that the compiler or the device refuses is none.
            found.append((float("inf"), f"{config}: {type(error).__name__}"))
    return sorted(found)


def checked() -> list[str]:
    """What is wrong, of a rank that holds all experts and of one that holds a few."""
    wrong: list[str] = []
    for shape in (SHAPES[0], SHAPES[2]):
        for skew in (0.0, 2.0):
            layer = Layer(shape, skew=skew)
            for rows in CHECKED_ROWS:
                wrong += check(layer, rows)
    return wrong


def show(row: dict[str, Any]) -> None:
    """One line, and the best candidates."""
    grouped = f"{row['grouped_us']:>10.1f}" if row["grouped_us"] else f"{'-':>10}"
    print(
        f"{row['shape']:<16}{row['rows']:>6}{row['hit']:>6.0f}{row['floor_us']:>9.1f}"
        f"{row['route_us']:>8.1f}{row['experts_us']:>9.1f}{row['layer_us']:>9.1f}"
        f"{row['over_floor']:>8.2f}{grouped}"
    )
    for us, config in row.get("candidates", [])[:5]:
        print(f"    {us:8.1f}  {config}")


def main() -> int:
    """Check, then print the table; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try every candidate")
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows to time")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    print(f"{describe()}, torch {torch.__version__}")
    wrong = checked()
    print("\n".join(["wrong:", *wrong]) if wrong else "results and bits are as promised")
    rows: list[dict[str, Any]] = []
    if not args.check_only:
        print(
            f"{'shape':<16}{'rows':>6}{'hit':>6}{'floor':>9}{'route':>8}{'experts':>9}{'layer':>9}"
            f"{'/ floor':>8}{'grouped':>10}"
        )
        for shape in (SHAPES[index] for index in args.shapes):
            layer = Layer(shape)
            for count in args.rows:
                row = measure(layer, count, speed_of(describe()))
                if args.tune:
                    row["candidates"] = tune(layer, count)
                show(row)
                rows.append(row)
    if args.json:
        found = {"machine": describe(), "torch": torch.__version__, "wrong": wrong, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
