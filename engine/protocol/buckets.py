"""How pieces of tensors share a broadcast; sender and receiver both compute it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from engine.protocol.updates import TensorPiece

BUCKET_ALIGNMENT = 16
"""Bytes that the pieces of a bucket are aligned to."""

ALONE_BYTES = 32 << 20
"""A piece of this size has a bucket of its own, which is sent from where it is."""

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}
"""Bytes of an element by torch dtype name."""


class Placement(Struct, frozen=True):
    """A piece at [offset, offset + num_bytes) of its bucket."""

    piece: TensorPiece
    offset: int
    num_bytes: int


class Bucket(Struct, frozen=True):
    """What one broadcast carries: `num_bytes` of uint8, the padding between pieces included."""

    placements: list[Placement]
    num_bytes: int


def piece_bytes(piece: TensorPiece) -> int:
    """Bytes of a piece. Raises KeyError on a dtype that is not in `ITEM_BYTES`."""
    stop = math.prod(piece.shape) if piece.stop < 0 else piece.stop
    return (stop - piece.start) * ITEM_BYTES[piece.dtype]


def plan_buckets(pieces: Sequence[TensorPiece], bucket_bytes: int) -> list[Bucket]:
    """The layout "buckets" of `ReceiveBroadcast`: sender and receiver both compute it.

    Pieces keep their order; a bucket ends before the piece that would exceed `bucket_bytes`, and
    one of `ALONE_BYTES` or more shares its bucket with none.
    """
    buckets: list[Bucket] = []
    placements: list[Placement] = []
    end, full = 0, False
    for piece in pieces:
        size = piece_bytes(piece)
        offset = -(-end // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
        alone = size >= ALONE_BYTES
        if placements and (alone or full or offset + size > bucket_bytes):
            buckets.append(Bucket(placements, end))
            placements, offset = [], 0
        placements.append(Placement(piece, offset, size))
        end, full = offset + size, alone
    if placements:
        buckets.append(Bucket(placements, end))
    return buckets
