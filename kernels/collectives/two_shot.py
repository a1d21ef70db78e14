"""The all-reduce of many rows: every rank adds up one share and sends the sum to all.

Of the first half of a lane the summands are read, of the second the sums. The order of the
additions is that of one shot, so the bits are too.

Legend: P positions of a tile within a share, in words of 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.collectives.exchange import add_in_order, collect, end_turn, leave, words


@triton.jit
def two_shot_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    addresses: tl.tuple,
    turns_ptr: tl.tensor,
    give_up_ptr: tl.tensor,
    num_words: tl.int32,
    share: tl.int32,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """share: words that one rank adds up; the last rank's may be fewer."""
    lane = tl.program_id(0)
    turn = tl.load(turns_ptr + lane)
    LANES_WORDS: tl.constexpr = LANES * LANE_WORDS
    lane_place = turn * (SIZE * LANES_WORDS) + lane * LANE_WORDS
    offset_P = tl.arange(0, TILE)
    step = tl.num_programs(0) * TILE
    place_P = lane_place + offset_P
    for start in tl.range(lane * TILE, share, step, num_stages=1):
        position_P = start + offset_P
        for hop in tl.static_range(1, SIZE):
            inside_P = (position_P < share) & (position_P + (RANK + hop) % SIZE * share < num_words)
            word_P = tl.load(
                x_ptr + (RANK + hop) % SIZE * share + position_P, mask=inside_P, other=0
            )
            leave(addresses[(RANK + hop) % SIZE], word_P, RANK * LANES_WORDS + place_P, inside_P)
        place_P += TILE
    words_ptr = tl.multiple_of(addresses[RANK].to(tl.pointer_type(tl.int32), bitcast=True), 16)
    place_P = lane_place + offset_P
    for start in tl.range(lane * TILE, share, step, num_stages=1):
        position_P = start + offset_P
        inside_P = (position_P < share) & (position_P + RANK * share < num_words)
        own_P = tl.load(x_ptr + RANK * share + position_P, mask=inside_P, other=0)
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
        low_P, high_P = add_in_order(own_P, parts, RANK, SIZE, DTYPE)
        sum_P = words(low_P, high_P, DTYPE)
        for hop in tl.static_range(1, SIZE):
            sum_place_P = RANK * LANES_WORDS + LANE_WORDS // 2 + place_P
            leave(addresses[(RANK + hop) % SIZE], sum_P, sum_place_P, inside_P)
        tl.store(out_ptr + RANK * share + position_P, sum_P, mask=inside_P)
        place_P += TILE
    place_P = lane_place + LANE_WORDS // 2 + offset_P
    for start in tl.range(lane * TILE, share, step, num_stages=1):
        position_P = start + offset_P
        parts = collect(
            words_ptr,
            give_up_ptr,
            place_P,
            position_P,
            share,
            num_words,
            position_P < share,
            RANK,
            SIZE,
            LANES_WORDS,
        )
        for source in tl.static_range(SIZE):
            inside_P = (position_P < share) & (position_P + source * share < num_words)
            if source < RANK:
                tl.store(out_ptr + source * share + position_P, parts[source], mask=inside_P)
            elif source > RANK:
                tl.store(out_ptr + source * share + position_P, parts[source - 1], mask=inside_P)
        place_P += TILE
    end_turn(turns_ptr, lane, turn)
