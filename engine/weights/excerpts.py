"""What this rank reads of each tensor: all that an update has to bring it.

Most parameters need the elements that they store. A codec may need more (a whole row, for its
scale), and what is encoded already, or is to be summed for a checksum, comes whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.layers.parameter import ShardedParameter
from engine.protocol import Block
from kernels.quant import Index

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Excerpt:
    """A block of a full tensor.

    ranges: [first, last) of each dim. sources: index the block, for each piece of the parameter's
    part; empty where the rank stores nothing of the tensor, which has no elements then.
    """

    ranges: Ranges
    sources: tuple[Index, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the block."""
        return tuple(last - first for first, last in self.ranges)

    @property
    def size(self) -> int:
        """Elements of the block."""
        return math.prod(self.shape)


def excerpt_of(parameter: ShardedParameter, key: str) -> Excerpt | None:
    """What is read of a full float tensor; None for one that is read here and there, which has to
    come whole."""
    part = parameter.parts[key]
    shape = part.full_shape
    if not part.pieces:
        return Excerpt(((0, 0),) * len(shape), ())
    found: set[Ranges] = set()
    sources: list[Index] = []
    for piece in part.pieces:
        ranges = _ranges(parameter.codec.reads(piece.source, shape), shape)
        if ranges is None:
            return None
        found.add(ranges)
        sources.append(_within(piece.source, ranges, shape))
    return Excerpt(found.pop(), tuple(sources)) if len(found) == 1 else None


def cut(full: torch.Tensor, excerpt: Excerpt) -> torch.Tensor:
    """The block of a full tensor: a view."""
    return full[tuple(slice(first, last) for first, last in excerpt.ranges)]


def _ranges(index: Index, shape: Sequence[int]) -> Ranges | None:
    """As a [first, last) for each dim; None if elements between them are left out."""
    found = []
    for entry, size in zip(index, shape, strict=True):
        first, last, step = (entry if isinstance(entry, slice) else _one(entry)).indices(size)
        if step != 1:
            return None
        found.append((first, max(first, last)))
    return tuple(found)


def _within(index: Index, ranges: Ranges, shape: Sequence[int]) -> Index:
    """An index of the full tensor as one of its block."""
    found: list[slice | int] = []
    for entry, (origin, _), size in zip(index, ranges, shape, strict=True):
        if isinstance(entry, slice):
            first, last, step = entry.indices(size)
            found.append(slice(first - origin, last - origin, step))
        else:
            found.append(entry - origin)
    return tuple(found)


def _one(entry: int) -> slice:
    return slice(entry, entry + 1)


def block_of(ranges: Ranges, shape: Sequence[int], start: int) -> Block:
    """A block as it is told to the trainer, with no more dims than it needs: those behind the last
    one that is cut count as one with it."""
    sizes, cuts = [*shape], [*ranges]
    while len(sizes) > 1 and cuts[-1] == (0, sizes[-1]):
        inner = sizes.pop()
        cuts.pop()
        first, last = cuts[-1]
        sizes[-1] *= inner
        cuts[-1] = (first * inner, last * inner)
    return Block(start, sizes, cuts)
