"""How programs of several GPUs hand each other words, and what the collectives do with them.

A program leaves words straight in the memory of its peers, without a flag or a barrier: a word
is there when it is not EMPTY any more. The reader empties what it has read. Words that are
EMPTY by themselves are NaN and become another NaN. (The idea that data is its own flag is
Lamport's, of reads and writes without mutual exclusion, CACM 20(11), 1977; NCCL's LL protocol and
TensorRT-LLM's all-reduce of few rows use it.)

Two halves of a lane suffice, by turns: a peer writes into a half again only once it has heard
from this rank in the call after, which this rank starts when it is done with the one before.

Positions are words of 32 bits, two numbers of 16 bits or one of 32.
"""

# Tuples grow in loops that the compiler unrolls.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

_EMPTY: tl.constexpr = tl.constexpr(-1)
_OTHER_NAN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_SPINS: tl.constexpr = tl.constexpr(256)


@triton.jit
def leave(address: tl.tensor, word_P: tl.tensor, place_P: tl.tensor, inside_P: tl.tensor) -> None:
    """Write words into the mailbox at `address`."""
    mailbox_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    word_P = tl.where(word_P == _EMPTY, _OTHER_NAN, word_P)
    tl.store(mailbox_ptr + place_P, word_P, mask=inside_P)


@triton.jit
def _look(
    words_ptr: tl.tensor,
    place_P: tl.tensor,
    position_P: tl.tensor,
    shift: tl.int32,
    end: tl.int32,
    inside_P: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES_WORDS: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    parts = ()
    missing_P = tl.zeros(position_P.shape, tl.int32)
    for source in tl.static_range(SIZE):
        if source != RANK:
            sent_P = inside_P & (position_P + source * shift < end)
            word_P = tl.load(
                words_ptr + source * LANES_WORDS + place_P, mask=sent_P, other=0, volatile=True
            )
            missing_P |= (word_P == _EMPTY).to(tl.int32)
            parts += (word_P,)
    return parts, tl.max(missing_P, axis=0)


@triton.jit
def collect(
    words_ptr: tl.tensor,
    give_up_ptr: tl.tensor,
    place_P: tl.tensor,
    position_P: tl.tensor,
    shift: tl.int32,
    end: tl.int32,
    inside_P: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES_WORDS: tl.constexpr,
) -> tl.tuple:
    """Wait for the words of every other rank, empty their places: the words, in the order of the
    ranks.

    place_P: of rank 0's words in this rank's memory. Rank s has left the word of position p where
    `p + s * shift < end`.
    """
    parts, missing = _look(
        words_ptr, place_P, position_P, shift, end, inside_P, RANK, SIZE, LANES_WORDS
    )
    spins = 0
    while missing != 0:
        parts, missing = _look(
            words_ptr, place_P, position_P, shift, end, inside_P, RANK, SIZE, LANES_WORDS
        )
        spins += 1
        if spins % _SPINS == 0:
            # Over the bus, so not every time.
            missing *= (tl.load(give_up_ptr, volatile=True) == 0).to(tl.int32)
    for source in tl.static_range(SIZE):
        if source != RANK:
            sent_P = inside_P & (position_P + source * shift < end)
            tl.store(
                words_ptr + source * LANES_WORDS + place_P,
                tl.full(position_P.shape, _EMPTY, tl.int32),
                mask=sent_P,
            )
    return parts


@triton.jit
def numbers(word_P: tl.tensor, DTYPE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The two numbers of words, as float32; of words that are float32 the number, twice."""
    if DTYPE.primitive_bitwidth == 32:
        low_P = word_P.to(tl.float32, bitcast=True)
        high_P = low_P
    else:
        low_P = (word_P & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high_P = (word_P >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low_P, high_P


@triton.jit
def words(low_P: tl.tensor, high_P: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Float32 numbers, rounded, as words."""
    if DTYPE.primitive_bitwidth == 32:
        word_P = low_P.to(tl.int32, bitcast=True)
    else:
        low_P = low_P.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high_P = high_P.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
        word_P = low_P | high_P
    return word_P


@triton.jit
def add_in_order(
    own_P: tl.tensor, parts: tl.tuple, RANK: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The sums of the two numbers of every rank's words, in the order of the ranks, float32."""
    if RANK == 0:
        low_P, high_P = numbers(own_P, DTYPE)
    else:
        low_P, high_P = numbers(parts[0], DTYPE)
    for source in tl.static_range(1, SIZE):
        if source == RANK:
            next_low_P, next_high_P = numbers(own_P, DTYPE)
        elif source < RANK:
            next_low_P, next_high_P = numbers(parts[source], DTYPE)
        else:
            next_low_P, next_high_P = numbers(parts[source - 1], DTYPE)
        low_P += next_low_P
        high_P += next_high_P
    return low_P, high_P


@triton.jit
def end_turn(turns_ptr: tl.tensor, lane: tl.int32, turn: tl.int32) -> None:
    """The next call of this lane uses the other half. Every thread knows `turn` by now: each has
    waited for words in between."""
    tl.debug_barrier()
    tl.store(turns_ptr + lane, 1 - turn)
