"""Tensors into buckets of bytes, one being packed while the one before it is on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.protocol import Bucket, Placement, TensorPiece, plan_buckets


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
        *,
        resident: bool = False,
    ) -> None:
        """Pack `flats`, the flattened elements of `pieces` in order, and broadcast each bucket.

        broadcast: queues a uint8 tensor and returns its work. wait: waits for a work on the
        host. resident: the flats keep their memory until this returns, so that one with a
        bucket of its own is sent from where it is. On a GPU everything is queued at once,
        ordered by streams, and only the end is waited for. Returns when every bucket was sent.
        """
        buckets = plan_buckets(pieces, self.bucket_bytes)
        packed = [b for b in buckets if not (resident and len(b.placements) == 1)]
        self._grow(max((bucket.num_bytes for bucket in packed), default=0))
        in_flight = _InFlight(broadcast, wait)
        try:
            self._send_buckets(buckets, flats, in_flight, resident=resident)
            in_flight.drain()
        finally:
            # A work keeps its connection; after a failure nobody may hold one.
            in_flight.forget()

    def _send_buckets(
        self,
        buckets: list[Bucket],
        flats: Iterator[torch.Tensor],
        in_flight: _InFlight,
        *,
        resident: bool,
    ) -> None:
        for bucket in buckets:
            source = flats
            if resident and len(bucket.placements) == 1:
                flat = next(flats)
                if flat.device == self._device and flat.is_contiguous():
                    in_flight.send(_bytes(flat, bucket.placements[0]))
                    continue
                source = iter([flat])
            self._send_packed(bucket, source, in_flight)

    def _send_packed(
        self, bucket: Bucket, flats: Iterator[torch.Tensor], in_flight: _InFlight
    ) -> None:
        if bucket.num_bytes > self._buffers[0].numel():
            in_flight.drain()
            self._grow(bucket.num_bytes)
        before = in_flight.reader()
        if before is not None and self._stream is None:
            in_flight.finish(before)
        buffer = self._buffers[in_flight.num_packed % 2]
        in_flight.send_packed(self._pack(buffer, bucket, flats, before))

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
                    # Has this stream wait, not the host: see `Link.broadcast`.
                    before.wait()
                self._copy(buffer, bucket, flats)
            current.wait_stream(self._stream)
        return buffer[: bucket.num_bytes]

    def _copy(self, buffer: torch.Tensor, bucket: Bucket, flats: Iterator[torch.Tensor]) -> None:
        for placement in bucket.placements:
            end = placement.offset + placement.num_bytes
            data = _bytes(next(flats), placement)
            buffer[placement.offset : end].copy_(data, non_blocking=True)


class _InFlight:
    """The broadcasts of one update that were queued and not waited for on the host."""

    def __init__(
        self, broadcast: Callable[[torch.Tensor], Any], wait: Callable[[Any], None]
    ) -> None:
        self._broadcast = broadcast
        self._wait = wait
        self._pending: list[Any] = []
        self._packed: list[Any] = []
        self.num_packed = 0

    def send(self, data: torch.Tensor) -> None:
        """Queue memory that nobody will overwrite."""
        self._pending.append(self._broadcast(data))

    def send_packed(self, data: torch.Tensor) -> None:
        """Queue one of the two buffers."""
        self.send(data)
        self._packed.append(self._pending[-1])
        self.num_packed += 1

    def reader(self) -> Any:
        """The broadcast that last read the buffer whose turn it is, if it may still do so."""
        return self._packed[-2] if len(self._packed) >= 2 else None

    def finish(self, work: Any) -> None:
        """Wait for one of them on the host."""
        self._pending.remove(work)
        self._wait(work)

    def drain(self) -> None:
        """Wait for all of them on the host."""
        for work in self._pending:
            self._wait(work)
        self.forget()

    def forget(self) -> None:
        """Drop them all, waited for or not."""
        self._pending.clear()
        self._packed.clear()


def _bytes(flat: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The elements of a piece as uint8, where they are if they are contiguous."""
    data = flat.contiguous().view(torch.uint8)
    assert data.numel() == placement.num_bytes, f"{placement.piece.name} is not as planned"
    return data
