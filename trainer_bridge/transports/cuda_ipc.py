"""Weights through memory that two processes of one host share: CUDA IPC, or POSIX shared
memory where the tensors are on the CPU.

A lasting source (`WeightSource.lasting`) is not copied here at all: the engine maps the
trainer's own storages and reads each byte once, at the commit. Others go bucket by bucket
through a retained buffer, which the engine has copied by the time it replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from kernels.torch_compat import export_cuda
from trainer_bridge.adapters.base import WeightSource, in_order, whole_piece
from trainer_bridge.fleet import Member, on_each
from trainer_bridge.transports.base import Carrier
from trainer_bridge.transports.handles import CudaAllocations, HandleCache
from trainer_bridge.update_target import UpdateTarget

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
        self._handles = HandleCache(partial(_export_cuda, device=device), CudaAllocations())
        self._lent: list[torch.Tensor] = []

    def carry(self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]) -> None:
        """See `Carrier`."""
        if source.lasting and self._device.type == "cuda":
            self._lend(begin, source, members)
        else:
            self._copy_through(begin, source, members)

    def settle(self, begin: BeginUpdate) -> None:
        """See `Carrier`: what was lent is read by the commit."""
        self._lent.clear()
        self._handles.forget_freed()

    def close(self) -> None:
        """See `Carrier`."""
        self._handles.clear()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _lend(self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]) -> None:
        """Have the engines map the tensors where they are; they are read at the commit."""
        buffers: list[IpcBuffer] = []
        index_of: dict[int, int] = {}
        placed = []
        for spec, tensor in zip(
            begin.manifest, in_order(begin.manifest, source.tensors()), strict=True
        ):
            # A view that is not contiguous has no place of its own; its copy lasts as long.
            tensor = tensor.contiguous()
            self._lent.append(tensor)
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in index_of:
                index_of[key] = len(buffers)
                buffers.append(self._handles.buffer_of(storage))
            placed.append(_tensor_at(spec, index_of[key], tensor.data_ptr() - key))
        # What the optimiser queued must be done before another process reads it.
        torch.cuda.synchronize(self._device)
        _send(members, IpcPayload(buffers, placed), begin.owner, borrow=True)

    def _copy_through(
        self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]
    ) -> None:
        """Bucket by bucket through one buffer: each tensor is copied before the next is asked
        for, and the engines have copied a bucket by the time they reply."""
        pieces = [whole_piece(spec) for spec in begin.manifest]
        specs = {spec.name: spec for spec in begin.manifest}
        tensors = in_order(begin.manifest, source.tensors())
        for bucket in plan_buckets(pieces, self._bucket_bytes):
            shared = self._buffer_of(bucket.num_bytes)
            placed = []
            for placement in bucket.placements:
                end = placement.offset + placement.num_bytes
                flat = next(tensors).detach().contiguous().reshape(-1).view(torch.uint8)
                shared.bytes[placement.offset : end].copy_(flat)
                placed.append(_tensor_at(specs[placement.piece.name], 0, placement.offset))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            _send(members, IpcPayload([shared.exported], placed), begin.owner, borrow=False)

    def _buffer_of(self, num_bytes: int) -> _SharedBuffer:
        if self._buffer is None or self._buffer.bytes.numel() < num_bytes:
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = _SharedBuffer(num_bytes, self._device)
        return self._buffer


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
        _, handle, size, offset, ref_handle, ref_offset, event, event_sync = export_cuda(storage)
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


def _tensor_at(spec: TensorSpec, buffer: int, offset: int) -> IpcTensor:
    return IpcTensor(spec.name, spec.dtype, spec.shape, buffer, offset)


def _send(members: Sequence[Member], payload: IpcPayload, owner: str, *, borrow: bool) -> None:
    command = ReceiveIpc(payloads=[encode(payload)], borrow=borrow, owner=owner)
    on_each(members, lambda member: member.send(command))
