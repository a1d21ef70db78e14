"""The all-reduce of few rows that adds them to a residual and normalises the sum, a row a program.

Legend: D width; P positions of a row in words of 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.collectives.exchange import add_in_order, collect, end_turn, leave, numbers, words
from kernels.norm.triton import norm_row


@triton.jit(do_not_specialize=["rows"])
def normed_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    total_words_ptr: tl.tensor,
    addresses: tl.tuple,
    turns_ptr: tl.tensor,
    give_up_ptr: tl.tensor,
    rows: tl.int32,
    eps: tl.float32,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    D: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    """x, residual and total_words: words of contiguous rows; total: the numbers of total_words."""
    lane = tl.program_id(0)
    turn = tl.load(turns_ptr + lane)
    LANES_WORDS: tl.constexpr = LANES * LANE_WORDS
    lane_place = turn * (SIZE * LANES_WORDS) + lane * LANE_WORDS
    offset_P = tl.arange(0, BLOCK_WORDS)
    inside_P = offset_P < ROW_WORDS
    place_P = lane_place + offset_P
    for row in tl.range(lane, rows, tl.num_programs(0), num_stages=1):
        word_P = tl.load(x_ptr + row * ROW_WORDS + offset_P, mask=inside_P, other=0)
        for hop in tl.static_range(1, SIZE):
            leave(addresses[(RANK + hop) % SIZE], word_P, RANK * LANES_WORDS + place_P, inside_P)
        place_P += ROW_WORDS
    words_ptr = tl.multiple_of(addresses[RANK].to(tl.pointer_type(tl.int32), bitcast=True), 16)
    place_P = lane_place + offset_P
    offset_D = tl.arange(0, BLOCK)
    inside_D = offset_D < D
    for row in tl.range(lane, rows, tl.num_programs(0), num_stages=1):
        own_P = tl.load(x_ptr + row * ROW_WORDS + offset_P, mask=inside_P, other=0)
        residual_P = tl.load(residual_ptr + row * ROW_WORDS + offset_P, mask=inside_P, other=0)
        parts = collect(
            words_ptr,
            give_up_ptr,
            place_P,
            offset_P,
            0,
            ROW_WORDS,
            inside_P,
            RANK,
            SIZE,
            LANES_WORDS,
        )
        low_P, high_P = add_in_order(own_P, parts, RANK, SIZE, DTYPE)
        # Rounded where the separate kernels round.
        low_P, high_P = numbers(words(low_P, high_P, DTYPE), DTYPE)
        residual_low_P, residual_high_P = numbers(residual_P, DTYPE)
        total_P = words(low_P + residual_low_P, high_P + residual_high_P, DTYPE)
        tl.store(total_words_ptr + row * ROW_WORDS + offset_P, total_P, mask=inside_P)
        # Read again as the numbers of the norm's own kernel: threads then have the same ones, and
        # add their squares in the same order.
        tl.debug_barrier()
        total_D = tl.load(total_ptr + row * D + offset_D, mask=inside_D, other=0.0)
        normed_D = norm_row(total_D, weight_ptr, offset_D, inside_D, eps, D, WIDE, OFFSET)
        tl.store(out_ptr + row * D + offset_D, normed_D, mask=inside_D)
        place_P += ROW_WORDS
    end_turn(turns_ptr, lane, turn)
