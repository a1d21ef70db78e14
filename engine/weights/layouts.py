"""How the tensors of one command are cut into broadcasts: the four layouts of the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import ManifestMismatch
from engine.protocol import (
    ITEM_BYTES,
    Bucket,
    Placement,
    ReceiveBroadcast,
    TensorPiece,
    piece_bytes,
    plan_buckets,
)


def broadcasts(command: ReceiveBroadcast) -> list[Bucket]:
    """The broadcasts that will come, in order; see `ReceiveBroadcast` for the layouts.

    Raises ManifestMismatch for a dtype that has no place on the wire.
    """
    for piece in command.tensors:
        torch_dtype(piece.dtype, piece.name)
    match command.layout:
        case "tensors":
            return [_bucket([piece]) for piece in command.tensors]
        case "flat":
            return [_bucket(command.tensors)] if command.tensors else []
        case "chunks":
            return _chunks(command.tensors, command.bucket_bytes)
        case "buckets":
            return plan_buckets(command.tensors, command.bucket_bytes)


def torch_dtype(name: str, tensor: str) -> torch.dtype:
    """torch.bfloat16 for 'bfloat16'. Raises ManifestMismatch naming the tensor for one that no
    weight can have."""
    dtype = getattr(torch, name) if name in ITEM_BYTES else None
    if dtype is None or not (dtype.is_floating_point or dtype == torch.int8):
        raise ManifestMismatch(f"{tensor} has dtype {name!r}, not a float", field=tensor)
    return dtype


def elements(buffer: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The elements of a piece, flat and typed, out of its broadcast.

    A view of `buffer` where the offset is a multiple of the element size, else a copy: layouts
    without padding may put four bytes behind two.
    """
    piece = placement.piece
    dtype = torch_dtype(piece.dtype, piece.name)
    part = buffer[placement.offset : placement.offset + placement.num_bytes]
    if part.data_ptr() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype)


def _bucket(pieces: Sequence[TensorPiece]) -> Bucket:
    """Pieces one behind the other, without padding."""
    placements: list[Placement] = []
    end = 0
    for piece in pieces:
        size = piece_bytes(piece)
        placements.append(Placement(piece, end, size))
        end += size
    return Bucket(placements, end)


def _chunks(pieces: Sequence[TensorPiece], chunk_bytes: int) -> list[Bucket]:
    """A chunk ends with the piece by which it exceeds `chunk_bytes`, as in vLLM's packed
    weight transfer."""
    chunks: list[Bucket] = []
    current: list[TensorPiece] = []
    size = 0
    for piece in pieces:
        current.append(piece)
        size += piece_bytes(piece)
        if size > chunk_bytes:
            chunks.append(_bucket(current))
            current, size = [], 0
    if current:
        chunks.append(_bucket(current))
    return chunks
