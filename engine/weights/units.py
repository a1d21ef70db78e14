"""From tensors as they come to the units that everything is noted by.

A fused tensor is cut into its units when it arrives, without a copy: a unit is complete, and can be
written, whatever came of the others. So a model may come under the names of its units, fused, cut
anywhere by trainers that hold a flat part of each, or some of it so and some so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.protocol import TensorPiece
from engine.weights.catalog import Catalog


@dataclass(frozen=True)
class Origin:
    """The tensor that a unit came in, by the name it was sent under, and the unit's first element
    in it."""

    name: str
    start: int


@dataclass(frozen=True)
class Cut:
    """A unit's part of a piece. piece: of the unit. offset: where in the sent piece it begins."""

    piece: TensorPiece
    offset: int
    origin: Origin


def bounds(piece: TensorPiece) -> tuple[int, int]:
    """[start, stop) of a piece's elements in the flattened tensor."""
    return piece.start, math.prod(piece.shape) if piece.stop < 0 else piece.stop


def cuts(piece: TensorPiece, catalog: Catalog) -> Iterator[Cut]:
    """What a piece of a fused tensor, whose range is one of the tensor, brings of each unit."""
    start, stop = bounds(piece)
    begin = 0
    for unit in catalog.units(piece.name):
        shape = list(catalog.shape(unit))
        end = begin + math.prod(shape)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            inner = TensorPiece(unit, piece.dtype, shape, first - begin, last - begin)
            yield Cut(inner, first - start, Origin(piece.name, begin))
        begin = end


def whole_units(
    name: str, tensor: torch.Tensor, catalog: Catalog
) -> Iterator[tuple[str, torch.Tensor, Origin]]:
    """The units of a whole fused tensor: views of it where it is contiguous."""
    flat = tensor.reshape(-1)
    begin = 0
    for unit in catalog.units(name):
        shape = catalog.shape(unit)
        size = math.prod(shape)
        yield unit, flat[begin : begin + size].view(shape), Origin(name, begin)
        begin += size
