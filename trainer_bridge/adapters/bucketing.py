"""Parameters in buckets, and in the dtype they travel in: what the sources share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from engine.protocol import TensorPiece, TensorSpec
from trainer_bridge.adapters.base import dtype_name

BUCKET_BYTES = 256 << 20

T = TypeVar("T")


def in_buckets(
    items: Iterable[T], num_bytes: Callable[[T], int], bucket_bytes: int
) -> Iterator[list[T]]:
    """Runs of items of at most `bucket_bytes` together, in order; a larger one is alone."""
    bucket: list[T] = []
    size = 0
    for item in items:
        added = num_bytes(item)
        if bucket and size + added > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += added
    if bucket:
        yield bucket


def wire_spec(
    name: str, shape: Sequence[int], dtype: torch.dtype, wire: torch.dtype | None
) -> TensorSpec:
    """The announcement of a tensor that is sent as `wire`, or as it is for None."""
    return TensorSpec(name, dtype_name(wire or dtype), list(shape))


def on_wire(tensor: torch.Tensor, wire: torch.dtype | None) -> torch.Tensor:
    """The tensor as it is sent: as `wire`, or as it is for None."""
    return tensor if wire is None else tensor.to(wire)


def piece_of(spec: TensorSpec, start: int, stop: int) -> TensorPiece:
    """Elements [start, stop) of the tensor of `spec`."""
    return TensorPiece(spec.name, spec.dtype, spec.shape, start, stop)


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, stop) of one rank's share where all ranks hold all elements; may be empty."""
    per_rank = math.ceil(numel / world_size)
    start = min(rank * per_rank, numel)
    return start, min(start + per_rank, numel)
