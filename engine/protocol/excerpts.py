"""What one rank takes of each tensor, and how it travels: a plan that both ends compute.

An *excerpt* is the elements of a tensor that a rank reads. Trainer ranks hold runs of the flat
elements of each tensor, engine ranks take blocks of it (`Block`); what the two have in
common is a run of the block's own elements, laid out row by row, so that it arrives as one
contiguous piece wherever the sender has it. Both ends cut those runs into the same messages from
the same facts, and no size or order travels with the tensors. That the plan is a pure function of
both sides' layouts follows Awex (inclusionAI/asystem-awex).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from engine.protocol.buckets import BUCKET_ALIGNMENT, ITEM_BYTES
from engine.protocol.updates import Block, Blocks, PlanExcerpts, RankExcerpts, TensorPiece


class Part(NamedTuple):
    """Elements [start, stop) of block number `block` of tensor number `tensor`, counted row by row
    within the block; `offset` bytes into their message."""

    tensor: int
    block: int
    start: int
    stop: int
    offset: int


class Message(NamedTuple):
    """What travels at once from one rank to another. One part alone, or several small ones."""

    parts: tuple[Part, ...]
    num_bytes: int


class Stage(NamedTuple):
    """Tensors [first, last), which come together, and the messages of one pair for them."""

    first: int
    last: int
    messages: tuple[Message, ...]


def block_size(block: Block) -> int:
    """Elements of a block."""
    return math.prod(last - first for first, last in block.ranges)


def elements_before(block: Block, place: int) -> int:
    """How many elements of a block lie before flat element `place` of its tensor."""
    rest = place - block.start
    if len(block.ranges) == 1:
        first, last = block.ranges[0]
        return min(max(rest, first), last) - first
    inner = block_size(block)
    if rest <= 0 or not inner:
        return 0
    stride = math.prod(block.shape)
    if rest >= stride:
        return inner
    before = 0
    for size, (first, last) in zip(block.shape, block.ranges, strict=True):
        stride //= size
        index, rest = divmod(rest, stride)
        inner //= last - first
        before += (min(max(index, first), last) - first) * inner
        if not first <= index < last:
            break
    return before


class Rectangle(NamedTuple):
    """Elements `start` + sum(index * stride) of a flat tensor, for every index below `sizes`."""

    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def rectangles(block: Block, start: int, stop: int) -> Iterator[Rectangle]:
    """Where elements [start, stop) of a block, counted row by row, lie in its flattened tensor:
    one rectangle behind the other, at most two a dim and one more."""
    strides = [math.prod(block.shape[dim + 1 :]) for dim in range(len(block.shape))]
    sizes = [last - first for first, last in block.ranges]
    origin = block.start + sum(
        first * stride for (first, _), stride in zip(block.ranges, strides, strict=True)
    )
    yield from _cut(origin, sizes, strides, start, stop)


def _cut(
    origin: int, sizes: Sequence[int], strides: Sequence[int], start: int, stop: int
) -> Iterator[Rectangle]:
    if not sizes:
        yield Rectangle(origin, (), ())
        return
    inner = math.prod(sizes[1:])
    (row, head), (end, tail) = divmod(start, inner), divmod(stop, inner)
    here, deeper = origin + row * strides[0], (sizes[1:], strides[1:])
    if row == end:
        yield from _cut(here, *deeper, head, tail)
        return
    if head:
        yield from _cut(here, *deeper, head, inner)
        row += 1
    if row < end:
        start_row = origin + row * strides[0]
        yield Rectangle(start_row, (end - row, *sizes[1:]), tuple(strides))
    if tail:
        yield from _cut(origin + end * strides[0], *deeper, 0, tail)


def stages(tensors: Sequence[TensorPiece], num_bytes: int) -> list[tuple[int, int]]:
    """Tensors [first, last) that come together: as many as have `num_bytes`, or one that has
    more."""
    found: list[tuple[int, int]] = []
    first = size = 0
    for number, tensor in enumerate(tensors):
        added = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if number > first and size + added > num_bytes:
            found.append((first, number))
            first, size = number, 0
        size += added
    if first < len(tensors):
        found.append((first, len(tensors)))
    return found


def pair_stages(plan: PlanExcerpts, sender: int, excerpts: RankExcerpts) -> list[Stage]:
    """What trainer rank `sender` sends to one engine rank, stage by stage; a stage in which it
    sends nothing has no messages."""
    by_tensor: dict[int, list[tuple[int, int]]] = {}
    for number, start, stop in plan.shares[sender]:
        by_tensor.setdefault(number, []).append((start, stop))
    found = []
    for first, last in stages(plan.tensors, plan.bucket_bytes * len(plan.shares)):
        runs = (
            run
            for number in range(first, last)
            for start, stop in by_tensor.get(number, ())
            for run in _runs(number, start, stop, excerpts.tensors[number])
        )
        found.append(Stage(first, last, _messages(plan, runs)))
    return found


def _runs(tensor: int, start: int, stop: int, blocks: Blocks) -> Iterator[Part]:
    """What flat elements [start, stop) of a tensor bring of each block."""
    for number, block in enumerate(blocks):
        first, last = elements_before(block, start), elements_before(block, stop)
        if first < last:
            yield Part(tensor, number, first, last, 0)


def _messages(plan: PlanExcerpts, runs: Iterable[Part]) -> tuple[Message, ...]:
    """Large parts alone, from one aligned address to another; the rest packed."""
    alone: list[Message] = []
    small: list[Part] = []
    end = 0
    for tensor, block, start, stop, _ in runs:
        item = ITEM_BYTES[plan.tensors[tensor].dtype]
        rest = [(start, stop)]
        if (stop - start) * item >= plan.direct_bytes:
            step = BUCKET_ALIGNMENT // item
            first, last = -(-start // step) * step, stop // step * step
            if (last - first) * item >= plan.direct_bytes:
                part = Part(tensor, block, first, last, 0)
                alone.append(Message((part,), (last - first) * item))
                rest = [(start, first), (last, stop)]
        for head, tail in rest:
            if head < tail:
                offset = -(-end // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
                small.append(Part(tensor, block, head, tail, offset))
                end = offset + (tail - head) * item
    packed = (Message(tuple(small), end),) if small else ()
    return (*alone, *packed)


def cuts_of(spans: Iterable[tuple[int, int]], item: int) -> tuple[list[int], list[int]]:
    """How to cut a message of elements of `item` bytes: the sizes of its runs, gaps included, and
    which of them are the parts. spans: (offset, bytes) of those, in order."""
    sizes: list[int] = []
    picks: list[int] = []
    end = 0
    for offset, num_bytes in spans:
        if offset > end:
            sizes.append((offset - end) // item)
        picks.append(len(sizes))
        sizes.append(num_bytes // item)
        end = offset + num_bytes
    return sizes, picks
