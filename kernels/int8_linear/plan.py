"""Which kernel multiplies which shape of int8, and how it is cut.

R rows, O output features of the result (half of a gated weight's), I input features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels.linear.plan import MAX_ROWS


@dataclass(frozen=True)
class Tiles:
    """Up to 16 rows: tiles of `block_o` x `block_i`, inputs divided over `splits` programs."""

    block_o: int
    block_i: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Gemm:
    """Any number of rows: tiles of `block_r` x `block_o` of the result."""

    block_r: int
    block_o: int
    block_i: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Vendor:
    """Sums by cuBLAS, which take memory of their own, then a kernel that scales them."""


Config = Tiles | Gemm | Vendor

_PROCESSORS = 132
"""Of an H100 and an H200; the rules below aim at filling them."""
VENDOR_ROWS = 192
"""Rows from which on cuBLAS sums."""


def choose(rows: int, outs: int, ins: int, *, gated: bool, can_split: bool) -> Config:
    """The configuration of a product. can_split: whether it may be split over its inputs."""
    if rows <= MAX_ROWS:
        config = _tiles(outs, ins, gated)
        return config if can_split else replace(config, splits=1)
    if rows >= VENDOR_ROWS and fits_vendor(rows, outs * (2 if gated else 1), ins):
        return Vendor()
    if rows <= 64:
        return Gemm(block_r=32 if rows <= 32 else 64, block_o=64, block_i=128, warps=4, stages=4)
    return Gemm(block_r=128, block_o=128, block_i=128, warps=8, stages=3)


def fits_vendor(rows: int, features: int, ins: int) -> bool:
    """Whether cuBLAS takes the shape. features: of the weight."""
    return rows > 16 and features % 8 == 0 and ins % 8 == 0


def _tiles(outs: int, ins: int, gated: bool) -> Tiles:
    """Two programs on every processor, by splits that come out even."""
    if gated:
        return Tiles(block_o=32, block_i=256, warps=4, stages=3)
    passes, tiles = -(-ins // 256), -(-outs // 64)
    most = min(8, -(-2 * _PROCESSORS // tiles))
    splits = max(n for n in range(1, most + 1) if passes % n == 0)
    return Tiles(block_o=64, block_i=256, warps=4, stages=4, splits=splits)
