"""Weights through memory that two processes of one host share: CUDA IPC, or POSIX shared
memory where the tensors are on the CPU.

A resident source (`WeightSource.is_resident`) is not copied here at all: the engine maps the
trainer's own storages and reads each byte once, at the commit. Others go bucket by bucket
through a retained buffer, which the engine has copied by the time it replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory

import torch

from engine.errors import UnsupportedOption
from engine.protocol import (
    BeginUpdate,
    IpcBuffer,
    IpcPayload,
    IpcTensor,
    ReceiveIpc,
    TensorSpec,
    encode,
    plan_buckets,
)
from trainer_bridge.adapters.base import WeightSource, dtype_name, whole_piece
from trainer_bridge.control import UpdateTarget
from trainer_bridge.transports.base import Carrier, on_each

BUCKET_BYTES = 256 << 20


class IpcCarrier(Carrier):
    """Shares this process's weights with engines of the same host (and GPU)."""

    def __init__(
        self,
        targets: Sequence[UpdateTarget],
        *,
        device: torch.device,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.targets = targets
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._buffer: _SharedBuffer | None = None
        self._exported: dict[int, IpcBuffer] = {}

    def carry(self, begin: BeginUpdate, source: WeightSource) -> None:
        """See `Carrier`."""
        if source.is_resident and self._device.type == "cuda":
            self._lend(source)
        else:
            self._copy_through(begin, source)

    def close(self) -> None:
        """See `Carrier`."""
        self._exported.clear()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _lend(self, source: WeightSource) -> None:
        """Have the engines map the tensors where they are; they are read at the commit."""
        buffers: list[IpcBuffer] = []
        index_of: dict[int, int] = {}
        tensors = []
        for name, tensor in source.tensors():
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in index_of:
                index_of[key] = len(buffers)
                buffers.append(self._export(storage))
            offset = tensor.data_ptr() - key
            tensors.append(
                IpcTensor(name, dtype_name(tensor.dtype), list(tensor.shape), index_of[key], offset)
            )
        # What the optimiser queued must be done before another process reads it.
        torch.cuda.synchronize(self._device)
        self._send(IpcPayload(buffers, tensors), borrow=True)

    def _export(self, storage: torch.UntypedStorage) -> IpcBuffer:
        known = self._exported.get(storage.data_ptr())
        if known is None or known.size != storage.nbytes():
            known = _export_cuda(storage, self._device)
            self._exported[storage.data_ptr()] = known
        return known

    def _copy_through(self, begin: BeginUpdate, source: WeightSource) -> None:
        pieces = [whole_piece(spec) for spec in begin.manifest]
        specs = {spec.name: spec for spec in begin.manifest}
        tensors = source.tensors()
        for bucket in plan_buckets(pieces, self._bucket_bytes):
            shared = self._buffer_of(bucket.num_bytes)
            placed = []
            for placement in bucket.placements:
                name, tensor = next(tensors)
                assert name == placement.piece.name, f"{name} came out of order"
                end = placement.offset + placement.num_bytes
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                shared.bytes[placement.offset : end].copy_(flat)
                placed.append(_tensor_at(specs[name], placement.offset))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._send(IpcPayload([shared.exported], placed), borrow=False)

    def _buffer_of(self, num_bytes: int) -> _SharedBuffer:
        if self._buffer is None or self._buffer.bytes.numel() < num_bytes:
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = _SharedBuffer(num_bytes, self._device)
        return self._buffer

    def _send(self, payload: IpcPayload, *, borrow: bool) -> None:
        command = ReceiveIpc(payloads=[encode(payload)], borrow=borrow)
        on_each(self.targets, lambda target: target.send(command))


class _SharedBuffer:
    """uint8 memory that another process can map, retained between updates."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._block: SharedMemory | None = None
        if device.type == "cuda":
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.exported = _export_cuda(self.bytes.untyped_storage(), device)
        else:
            self._block = SharedMemory(create=True, size=num_bytes)
            self.bytes = torch.frombuffer(self._block.buf, dtype=torch.uint8)
            self.exported = IpcBuffer(kind="shm", size=num_bytes, name=self._block.name)

    def close(self) -> None:
        del self.bytes
        if self._block is not None:
            self._block.close()
            self._block.unlink()


def _export_cuda(storage: torch.UntypedStorage, device: torch.device) -> IpcBuffer:
    try:
        _, handle, size, offset, ref_handle, ref_offset, event, event_sync = storage._share_cuda_()
    except RuntimeError as error:
        raise UnsupportedOption(
            f"this allocation cannot be shared between processes ({error}); unset "
            "expandable_segments in PYTORCH_CUDA_ALLOC_CONF or use the 'nccl' transport",
            field="transport",
        ) from error
    return IpcBuffer(
        kind="cuda",
        size=size,
        device=str(torch.cuda.get_device_properties(device).uuid),
        handle=handle,
        offset=offset,
        ref_handle=ref_handle,
        ref_offset=ref_offset,
        event=event,
        event_sync=event_sync,
    )


def _tensor_at(spec: TensorSpec, offset: int) -> IpcTensor:
    return IpcTensor(spec.name, spec.dtype, spec.shape, 0, offset)
