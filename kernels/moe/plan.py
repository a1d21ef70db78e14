"""How the products of experts are cut, by rows and shape. Torch-free.

H hidden width, I inner width; T tokens, P pairs of a token and an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_PAIR_ROWS = 4
"""Rows up to which a pair is multiplied by itself: few of them share an expert."""
SORT_BLOCK = 4096
"""Pairs that one program of the sort looks at; more of them take a kernel before it that counts."""
FEW_PAIRS = 512
"""Pairs up to which the sort has a narrower program."""


@dataclass(frozen=True)
class Gemv:
    """A product of one pair: a program takes `block_o` output features over all inputs."""

    block_o: int
    warps: int


@dataclass(frozen=True)
class Tile:
    """A product of up to `block_p` pairs of an expert: a program takes `block_o` output features,
    `block_i` inputs a pass, `stages` passes in flight."""

    block_o: int
    block_i: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ByPair:
    """Every pair by itself: up, then down."""

    up: Gemv
    down: Gemv


@dataclass(frozen=True)
class ByTile:
    """Pairs sorted by expert, `block_p` of one expert at a time: up, then down."""

    block_p: int
    up: Tile
    down: Tile


Config = ByPair | ByTile


@dataclass(frozen=True)
class Logits:
    """The router's product: tiles of `block_t` tokens by `block_n` experts.

    Inputs are summed in parts of `part`, and the parts in their order. apart: each in a program of
    its own, where tokens are too few to fill a GPU.
    """

    block_t: int
    block_n: int
    block_i: int
    part: int
    apart: bool
    warps: int


def choose(rows: int, top_k: int, num_experts: int, hidden: int, inner: int) -> Config:
    """The configuration for so many tokens. num_experts: of the whole model, over all ranks.

    Tiles take the pairs that an expert has on average and half as many again, so that most experts
    need one: the weights, which bound the time to some thousand rows, are then read once.
    """
    if rows <= MAX_PAIR_ROWS:
        # A program of down has a token's experts in flight together: one feature is enough.
        down = replace(_gemv(inner, gated=False), block_o=1)
        return ByPair(up=_gemv(hidden, gated=True), down=down)
    mean = rows * top_k / num_experts
    block_p = next((size for size in (16, 32, 64) if 1.5 * mean <= size), 128)
    return ByTile(
        block_p,
        up=_tile(block_p, hidden, gated=True),
        down=_tile(block_p, inner, gated=False),
    )


def choose_logits(rows: int) -> Logits:
    """The configuration of a router's product: one order of sums for any number of rows, so that no
    batch sends a token elsewhere. Tiles of fewer than 64 experts are multiplied by the one
    instruction that small tiles have too, 16 inputs at a time."""
    if rows <= 64:
        return Logits(block_t=16, block_n=16, block_i=128, part=512, apart=True, warps=1)
    return Logits(block_t=64, block_n=32, block_i=64, part=512, apart=False, warps=4)


def num_tiles(pairs: int, slots: int, block_p: int) -> int:
    """Entries of the table of tiles, whoever the pairs go to; see `kernels.moe.sort`."""
    return min(pairs, slots + pairs // block_p)


def _gemv(ins: int, *, gated: bool) -> Gemv:
    """Pieces of 16 bytes a thread, about 8 of them in flight; the warps, which the order of the
    sums follows, depend on the inputs alone."""
    pieces = -(-ins // 256)
    warps = next((warps for warps in (4, 2) if pieces >= 2 * warps), 1)
    each = -(-pieces // warps) * (2 if gated else 1)
    return Gemv(block_o=next((size for size in (8, 4, 2) if size * each <= 8), 1), warps=warps)


def _tile(block_p: int, ins: int, *, gated: bool) -> Tile:
    """Passes that come out even, of tiles that two programs of a processor have room for; of one
    where the product and no longer the weight bounds the time."""
    block_i = next((size for size in (128, 64) if ins % size == 0), 32 if ins <= 32 else 64)
    if block_p <= 32:
        return Tile(64 if gated else 128, block_i, warps=4, stages=3)
    block_i = min(block_i, 64)
    if block_p == 64:
        return Tile(64 if gated else 128, block_i, warps=4, stages=4)
    return Tile(128 if gated else 256, block_i, warps=8, stages=3)
