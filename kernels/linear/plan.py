"""Which kernel multiplies which shape, and how it is cut.

R rows, O output features of the result (half of a gated weight's), I input features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_ROWS = 16
"""Rows from which on cuBLAS multiplies."""
MAX_GEMV_ROWS = 2
"""Rows that get the same sums, in the same order, as one row alone."""


@dataclass(frozen=True)
class Gemv:
    """A few rows: a program takes `block_o` features, `warps` times 256 inputs a pass.

    stages: turns of the loop in flight through shared memory; 1 loads into registers.
    unroll: passes of a turn, all of whose loads are in flight together.
    """

    block_o: int
    warps: int
    stages: int = 1
    unroll: int = 1

    @property
    def block_i(self) -> int:
        """Eight elements of 16 bits a thread: x and a row of the weight are then laid out
        alike, and no value passes through shared memory on its way to a product."""
        return 256 * self.warps


@dataclass(frozen=True)
class Tiles:
    """Up to 16 rows: tiles of `block_o` x `block_i`, inputs divided over `splits` programs."""

    block_o: int
    block_i: int
    warps: int
    stages: int
    splits: int = 1


Config = Gemv | Tiles

_PROCESSORS = 132
"""Of an H100 and an H200; the rules below aim at filling them."""


def choose(rows: int, outs: int, ins: int, *, gated: bool, can_split: bool) -> Config | None:
    """The configuration for a product of 16-bit numbers; None where cuBLAS is left to it.

    can_split: whether a product may be split over its inputs.
    """
    if not 0 < rows <= MAX_ROWS:
        return None
    # Rows that are not read in pieces of 16 bytes are shared out among threads otherwise when there
    # are two of them, and would be summed in another order.
    if rows == 1 or (rows <= MAX_GEMV_ROWS and ins % 8 == 0):
        return _gemv(rows, ins)
    config = _tiles(outs, ins, gated)
    return config if can_split else replace(config, splits=1)


def _gemv(rows: int, ins: int) -> Gemv:
    """Passes that come out even. The warps, which the order of the sums follows, depend on the
    inputs alone. Two rows share what is read of the weight, and two features what is read of the
    rows; where a row takes several turns, the next one's loads go through shared memory."""
    warps = next((w for w in (4, 2) if ins % (256 * w) == 0), 1)
    passes = -(-ins // (256 * warps))
    unroll = max(n for n in range(1, 6) if passes % n == 0)
    if rows == 1:
        return Gemv(1, warps, unroll=unroll)
    return Gemv(2, warps, stages=3 if passes > unroll else 1, unroll=unroll)


def _tiles(outs: int, ins: int, gated: bool) -> Tiles:
    """Two programs on every processor, by splits that come out even."""
    if gated:
        return Tiles(block_o=32, block_i=128, warps=4, stages=3)
    passes, tiles = -(-ins // 128), -(-outs // 64)
    most = min(8, -(-2 * _PROCESSORS // tiles))
    splits = max(n for n in range(1, most + 1) if passes % n == 0)
    return Tiles(block_o=64, block_i=128, warps=4, stages=4, splits=splits)
