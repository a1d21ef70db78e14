"""Pairs of a token and an expert in the order of the experts, those of one in their own order, and
the tiles that they are multiplied in.

A program a slot counts what comes before it and places what is its own: no program waits for
another, and every entry that may be read is written. It knows the pairs before its own, not which
slots they are in; so its tiles begin where they would if each of those slots had one tile more than
it fills, or each pair a tile, whichever the table is cut for. Entries between the tiles of two
slots hold none.

P pairs of a block, S slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_TILE: tl.constexpr = tl.constexpr(-1)
"""The slot of a tile that is none."""


@triton.jit
def _slots(
    ids_ptr: tl.tensor,
    pair_P: tl.tensor,
    pairs: tl.int32,
    first_slot: tl.int32,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """SLOTS for pairs that no slot holds."""
    id_P = tl.load(ids_ptr + pair_P, mask=pair_P < pairs, other=-1)
    slot_P = id_P - first_slot
    return tl.where((id_P >= 0) & (slot_P >= 0) & (slot_P < SLOTS), slot_P, SLOTS)


@triton.jit(do_not_specialize=["pairs", "first_slot"])
def count_kernel(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    pairs: tl.int32,
    first_slot: tl.int32,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """How many pairs of a block go to a slot: int32 [blocks, slots]."""
    slot, block = tl.program_id(0), tl.program_id(1)
    pair_P = block * BLOCK_P + tl.arange(0, BLOCK_P)
    slot_P = _slots(ids_ptr, pair_P, pairs, first_slot, SLOTS)
    count = tl.sum((slot_P == slot).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * SLOTS + slot, count)


@triton.jit
def _first_tile(
    before: tl.tensor, slot: tl.tensor, TILE: tl.constexpr, BY_PAIR: tl.constexpr
) -> tl.tensor:
    """Where the tiles of a slot begin in the table, behind so many pairs."""
    if BY_PAIR:
        return before
    return before // TILE + slot


@triton.jit
def _write_tiles(
    tiles_ptr: tl.tensor,
    slot: tl.tensor,
    before: tl.tensor,
    count: tl.tensor,
    num_tiles: tl.int32,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """(slot, first, end) of every tile of a slot, and no tile from there to those of the next, or
    to the end of the table."""
    first = _first_tile(before, slot, TILE, BY_PAIR)
    next_first = _first_tile(before + count, slot + 1, TILE, BY_PAIR)
    next_first = tl.where(slot == SLOTS - 1, num_tiles, next_first)
    for start in tl.range(0, next_first - first, BLOCK_M):
        tile_M = start + tl.arange(0, BLOCK_M)
        inside_M = tile_M < next_first - first
        pointers_M = tiles_ptr + (first + tile_M) * 3
        begin_M = tile_M * TILE
        tl.store(pointers_M, tl.where(begin_M < count, slot, NO_TILE), mask=inside_M)
        tl.store(pointers_M + 1, before + begin_M, mask=inside_M)
        tl.store(pointers_M + 2, before + tl.minimum(begin_M + TILE, count), mask=inside_M)


@triton.jit(do_not_specialize=["pairs", "first_slot", "blocks", "num_tiles"])
def place_kernel(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    sorted_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    pairs: tl.int32,
    first_slot: tl.int32,
    blocks: tl.int32,
    num_tiles: tl.int32,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BY_PAIR: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """sorted_ptr: int32 pairs. tiles_ptr: int32 [tiles, 3], of TILE pairs each.
    COUNTED: there are several blocks, and counts_ptr has theirs."""
    slot, block = tl.program_id(0), tl.program_id(1)
    pair_P = block * BLOCK_P + tl.arange(0, BLOCK_P)
    slot_P = _slots(ids_ptr, pair_P, pairs, first_slot, SLOTS)
    mine_P = (slot_P == slot).to(tl.int32)
    before = tl.sum((slot_P < slot).to(tl.int32), axis=0)
    count = tl.sum(mine_P, axis=0)
    of_earlier_blocks = 0
    if COUNTED:
        slot_S = tl.arange(0, BLOCK_S)
        before, count = 0, 0
        for other in tl.range(blocks):
            counts_S = tl.load(counts_ptr + other * SLOTS + slot_S, mask=slot_S < SLOTS, other=0)
            before += tl.sum(tl.where(slot_S < slot, counts_S, 0), axis=0)
            own = tl.sum(tl.where(slot_S == slot, counts_S, 0), axis=0)
            count += own
            of_earlier_blocks += tl.where(other < block, own, 0)
    place_P = before + of_earlier_blocks + tl.cumsum(mine_P, axis=0) - 1
    tl.store(sorted_ptr + place_P, pair_P, mask=mine_P > 0)
    if block == 0:
        _write_tiles(tiles_ptr, slot, before, count, num_tiles, SLOTS, TILE, BY_PAIR, BLOCK_M)
