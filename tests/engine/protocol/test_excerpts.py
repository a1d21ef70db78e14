"""The plan of a transfer: against every element counted one by one, on drawn layouts."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from engine.protocol import (
    BUCKET_ALIGNMENT,
    ITEM_BYTES,
    Block,
    PlanExcerpts,
    RankExcerpts,
    TensorPiece,
    block_size,
    pair_stages,
    rectangles,
    stages,
)
from engine.protocol.excerpts import elements_before

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float64")


def flat_places(block: Block) -> list[int]:
    """Flat elements of a block's tensor that the block is, row by row."""
    places = np.arange(math.prod(block.shape)).reshape(block.shape)
    cut = places[tuple(slice(first, last) for first, last in block.ranges)]
    return [block.start + int(place) for place in cut.reshape(-1)]


def drawn_block(draw: random.Random, start: int = 0) -> Block:
    shape = [draw.randint(1, 5) for _ in range(draw.randint(0, 4))]
    ranges = []
    for size in shape:
        first = draw.randint(0, size)
        ranges.append((first, draw.randint(first, size)))
    return Block(start, shape, ranges)


@pytest.mark.parametrize("seed", range(40))
def test_runs_and_rectangles_are_those_of_every_element_counted(seed: int) -> None:
    draw = random.Random(seed)
    block = drawn_block(draw, start=draw.randint(0, 7))
    places = flat_places(block)
    assert block_size(block) == len(places)
    for place in range(block.start + math.prod(block.shape) + 3):
        assert elements_before(block, place) == sum(other < place for other in places)
    for _ in range(8):
        start = draw.randint(0, len(places))
        stop = draw.randint(start, len(places))
        found = []
        for first, sizes, strides in rectangles(block, start, stop) if start < stop else ():
            for index in np.ndindex(*sizes):
                found.append(first + sum(i * s for i, s in zip(index, strides, strict=True)))
        assert found == places[start:stop]


def drawn_plan(draw: random.Random) -> tuple[PlanExcerpts, list[RankExcerpts]]:
    """Tensors of one or two units, cut among trainer ranks anywhere, each taken by some ranks."""
    num_senders, num_ranks = draw.randint(1, 3), draw.randint(1, 3)
    tensors, needs = [], [RankExcerpts(tensors=[]) for _ in range(num_ranks)]
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(num_senders)]
    for number in range(draw.randint(1, 6)):
        shape = [draw.randint(1, 6) for _ in range(draw.randint(1, 3))]
        size, units = math.prod(shape), draw.randint(1, 2)
        tensors.append(TensorPiece(f"t{number}", draw.choice(DTYPES), [units, *shape]))
        cuts = sorted(draw.randint(0, units * size) for _ in range(num_senders - 1))
        for sender, (start, stop) in enumerate(pairwise([0, *cuts, units * size])):
            if start < stop:
                shares[sender].append((number, start, stop))
        for rank in needs:
            blocks = []
            for unit in range(units):
                ranges = [sorted(draw.choices(range(n + 1), k=2)) for n in shape]
                block = Block(unit * size, shape, [(low, high) for low, high in ranges])
                if block_size(block):
                    blocks.append(block)
            rank.tensors.append(blocks)
    command = PlanExcerpts(
        group="g",
        tensors=tensors,
        shares=shares,
        bucket_bytes=draw.choice([1, 40, 200, 1 << 20]),
        direct_bytes=draw.choice([1, 32, 1 << 20]),
    )
    return command, needs


@pytest.mark.parametrize("seed", range(60))
def test_every_element_that_a_rank_takes_comes_once_from_who_holds_it(seed: int) -> None:
    command, needs = drawn_plan(random.Random(seed))
    for excerpts in needs:
        came: dict[tuple[int, int], list[int]] = {}
        for sender, shares in enumerate(command.shares):
            held = {number: range(start, stop) for number, start, stop in shares}
            for first, last, messages in pair_stages(command, sender, excerpts):
                for message in messages:
                    assert_packed(command, message)
                    for part in message.parts:
                        assert first <= part.tensor < last
                        block = excerpts.tensors[part.tensor][part.block]
                        places = flat_places(block)[part.start : part.stop]
                        assert all(place in held[part.tensor] for place in places)
                        came.setdefault((part.tensor, part.block), []).extend(
                            range(part.start, part.stop)
                        )
        for number, blocks in enumerate(excerpts.tensors):
            for place, block in enumerate(blocks):
                assert sorted(came.pop((number, place))) == list(range(block_size(block)))
        assert not came


def assert_packed(command: PlanExcerpts, message) -> None:
    """Parts lie aligned, one behind the other, and a large one alone."""
    end = 0
    for part in message.parts:
        item = ITEM_BYTES[command.tensors[part.tensor].dtype]
        assert part.offset >= end and part.offset % BUCKET_ALIGNMENT == 0
        end = part.offset + (part.stop - part.start) * item
        if len(message.parts) > 1:
            aligned = (part.stop - part.start) * item - 2 * BUCKET_ALIGNMENT
            assert aligned < command.direct_bytes
    assert end == message.num_bytes


def test_stages_are_whole_tensors_and_at_most_so_many_bytes_unless_one_is_larger() -> None:
    tensors = [TensorPiece(f"t{n}", "float32", [n]) for n in (1, 2, 3, 40, 1, 1)]
    assert stages(tensors, 24) == [(0, 3), (3, 4), (4, 6)]
    assert stages(tensors, 1) == [(n, n + 1) for n in range(6)]
    assert stages([], 24) == []
