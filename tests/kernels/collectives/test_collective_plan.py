"""Whatever a mailbox has room for is cut so that it fits its lanes."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import collectives
from kernels.collectives.mailbox import EMPTY, NUM_LANES, open_mailbox, words_shape
from kernels.collectives.plan import choose, programs, share_words


def capacity(size: int, num_bytes: int) -> int:
    """Words that a rank may leave for another in one call."""
    return NUM_LANES * words_shape(size, num_bytes)[-1]


@pytest.mark.parametrize("num_bytes", [0, 1 << 20, 32 << 20, 100 << 20])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 16])
def test_every_length_up_to_the_capacity_fits(size: int, num_bytes: int) -> None:
    most, lane_words = capacity(size, num_bytes), words_shape(size, num_bytes)[-1]
    for num_words in sorted({*range(1, 99), *range(1, most, most // 57 + 1), most - 1, most}):
        cut = choose(num_words)
        used = programs(num_words, cut, lane_words)
        assert 0 < used <= NUM_LANES
        assert math.ceil(math.ceil(num_words / cut.tile) / used) * cut.tile <= lane_words


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 16])
def test_two_shots_take_half_a_lane_for_summands_and_half_for_sums(size: int) -> None:
    lane_words = words_shape(size, 32 << 20)[-1]
    most = capacity(size, 32 << 20) // 2 * size
    for num_words in (1, 15, 16, 17, most // 2 + 1, most - 1, most):
        share = share_words(num_words, size)
        assert share * size >= num_words
        assert share % 16 == 0
        programs(share, choose(share), lane_words // 2)


def test_more_than_the_capacity_is_refused() -> None:
    lane_words = words_shape(2, 32 << 20)[-1]
    with pytest.raises(AssertionError, match="more than a lane holds"):
        programs(capacity(2, 32 << 20) + 1, choose(1 << 22), lane_words)


def test_a_mailbox_keeps_to_the_memory_it_is_given() -> None:
    for size in (2, 3, 4, 8):
        shape = words_shape(size, 32 << 20)
        assert 4 * math.prod(shape) <= 32 << 20
        assert 4 * math.prod(words_shape(size, 0)) > 0


def test_an_opened_mailbox_is_empty() -> None:
    words = torch.zeros(words_shape(2, 0), dtype=torch.int32)
    box = open_mailbox(1, words, [16, 32], torch.zeros(1, dtype=torch.int32))
    assert (words == EMPTY).all()
    assert not box.turns.any()
    assert (box.rank, box.size, box.addresses) == (1, 2, (16, 32))
    assert box.source_bytes * 2 * box.size == words.nbytes


def test_what_cannot_be_sent() -> None:
    assert not collectives.can_send(torch.zeros(4))
    if torch.cuda.is_available():
        assert collectives.can_send(torch.zeros(4, device="cuda"))
        odd = torch.zeros(4, device="cuda", dtype=torch.bfloat16)[:3]
        whole = torch.zeros(4, device="cuda", dtype=torch.int32)
        assert not collectives.can_send(odd)
        assert not collectives.can_send(whole)
