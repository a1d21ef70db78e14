"""Tensors into buckets of bytes, one being packed while the one before it is on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.protocol import Bucket, TensorPiece, plan_buckets


class BucketPacker:
    """Packs pieces in the layout "buckets" into retained uint8 buffers, two in turn.

    Buffers are allocated at the first update, so that later ones take no new memory. On a GPU
    copies run on a stream of their own, which waits for the trainer's work and for the
    broadcast that last read the buffer.
    """

    def __init__(self, device: torch.device, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(
        self,
        pieces: list[TensorPiece],
        flats: Iterator[torch.Tensor],
        broadcast: Callable[[torch.Tensor], Any],
        wait: Callable[[Any], None],
    ) -> None:
        """Pack `flats`, the flattened elements of `pieces` in order, and broadcast each bucket.

        broadcast: queues a uint8 tensor and returns its work. wait: waits for a work on the
        host. On a GPU everything is queued at once, ordered by streams, and only the end is
        waited for. Returns when every bucket was sent.
        """
        buckets = plan_buckets(pieces, self.bucket_bytes)
        self._grow(max((bucket.num_bytes for bucket in buckets), default=0))
        works: list[Any] = []
        for index, bucket in enumerate(buckets):
            before = works[index - 2] if index >= 2 else None
            if before is not None and self._stream is None:
                wait(before)
            packed = self._pack(self._buffers[index % 2], bucket, flats, before)
            works.append(broadcast(packed))
        for work in works[-2:]:
            wait(work)

    def _grow(self, num_bytes: int) -> None:
        if not self._buffers or self._buffers[0].numel() < num_bytes:
            self._buffers = [
                torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)
            ]

    def _pack(
        self, buffer: torch.Tensor, bucket: Bucket, flats: Iterator[torch.Tensor], before: Any
    ) -> torch.Tensor:
        """Copy into `buffer`; `before` is the broadcast that reads it until then."""
        if self._stream is None:
            self._copy(buffer, bucket, flats)
        else:
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                if before is not None:
                    # Has this stream wait, not the host: `wait` of an NCCL work does.
                    before.wait()
                self._copy(buffer, bucket, flats)
            current.wait_stream(self._stream)
        return buffer[: bucket.num_bytes]

    def _copy(self, buffer: torch.Tensor, bucket: Bucket, flats: Iterator[torch.Tensor]) -> None:
        for placement in bucket.placements:
            flat = next(flats).contiguous().view(torch.uint8)
            end = placement.offset + placement.num_bytes
            assert flat.numel() == placement.num_bytes, f"{placement.piece.name} is not as planned"
            buffer[placement.offset : end].copy_(flat, non_blocking=True)
