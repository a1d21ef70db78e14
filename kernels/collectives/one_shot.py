"""Collectives in which every rank sends once: each rank's words go to those that need them.

Legend: P positions of a tile, in words of 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.collectives.exchange import add_in_order, collect, end_turn, leave, words


@triton.jit
def one_shot_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    addresses: tl.tuple,
    turns_ptr: tl.tensor,
    give_up_ptr: tl.tensor,
    num_words: tl.int32,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    SCATTER: tl.constexpr,
    REDUCE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """num_words: of one rank's share. SCATTER: x has a share for every rank, else the same goes to
    all. REDUCE: out is the sum of the shares, else has them one behind the other."""
    lane = tl.program_id(0)
    turn = tl.load(turns_ptr + lane)
    LANES_WORDS: tl.constexpr = LANES * LANE_WORDS
    lane_place = turn * (SIZE * LANES_WORDS) + lane * LANE_WORDS
    offset_P = tl.arange(0, TILE)
    step = tl.num_programs(0) * TILE
    place_P = lane_place + offset_P
    for start in tl.range(lane * TILE, num_words, step, num_stages=1):
        position_P = start + offset_P
        inside_P = position_P < num_words
        if not SCATTER:
            word_P = tl.load(x_ptr + position_P, mask=inside_P, other=0)
        for hop in tl.static_range(1, SIZE):
            if SCATTER:
                share_ptr = x_ptr + tl.cast((RANK + hop) % SIZE, tl.int64) * num_words
                word_P = tl.load(share_ptr + position_P, mask=inside_P, other=0)
            leave(addresses[(RANK + hop) % SIZE], word_P, RANK * LANES_WORDS + place_P, inside_P)
        place_P += TILE
    words_ptr = tl.multiple_of(addresses[RANK].to(tl.pointer_type(tl.int32), bitcast=True), 16)
    place_P = lane_place + offset_P
    for start in tl.range(lane * TILE, num_words, step, num_stages=1):
        position_P = start + offset_P
        inside_P = position_P < num_words
        own_ptr = x_ptr
        if SCATTER:
            own_ptr += tl.cast(RANK, tl.int64) * num_words
        own_P = tl.load(own_ptr + position_P, mask=inside_P, other=0)
        parts = collect(
            words_ptr,
            give_up_ptr,
            place_P,
            position_P,
            0,
            num_words,
            inside_P,
            RANK,
            SIZE,
            LANES_WORDS,
        )
        if REDUCE:
            low_P, high_P = add_in_order(own_P, parts, RANK, SIZE, DTYPE)
            tl.store(out_ptr + position_P, words(low_P, high_P, DTYPE), mask=inside_P)
        else:
            for source in tl.static_range(SIZE):
                share_ptr = out_ptr + tl.cast(source, tl.int64) * num_words
                if source == RANK:
                    tl.store(share_ptr + position_P, own_P, mask=inside_P)
                elif source < RANK:
                    tl.store(share_ptr + position_P, parts[source], mask=inside_P)
                else:
                    tl.store(share_ptr + position_P, parts[source - 1], mask=inside_P)
        place_P += TILE
    end_turn(turns_ptr, lane, turn)
