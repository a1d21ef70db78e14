"""GPU memory of other processes, mapped once and kept for the updates that follow."""

from __future__ import annotations

import torch

from engine.errors import InvalidRequest, WeightUpdateError
from engine.protocol import IpcBuffer
from kernels.torch_compat import import_cuda

_KEPT_UPDATES = 2


class MappedBuffers:
    """Buffers of trainers by their handle; opening one costs more than the copy it is for.

    A buffer that the last two updates did not use is unmapped, so that the trainer's memory
    goes back to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[IpcBuffer, torch.Tensor] = {}
        self._last_use: dict[IpcBuffer, int] = {}
        self._updates: list[int] = []

    def __len__(self) -> int:
        return len(self._mapped)

    def open(self, buffers: list[IpcBuffer], version: int) -> list[torch.Tensor]:
        """The bytes of each buffer, uint8 [size], for the update to `version`.

        Raises InvalidRequest or WeightUpdateError for memory that cannot be mapped here.
        """
        self._turn_to(version)
        for buffer in buffers:
            if buffer not in self._mapped:
                self._mapped[buffer] = self._map(buffer)
            self._last_use[buffer] = version
        return [self._mapped[buffer] for buffer in buffers]

    def close(self) -> None:
        """Unmap everything. Idempotent."""
        self._mapped.clear()
        self._last_use.clear()

    def _turn_to(self, version: int) -> None:
        if self._updates[-1:] == [version]:
            return
        self._updates = [*self._updates[1 - _KEPT_UPDATES :], version]
        kept = set(self._updates)
        for buffer in [b for b, last in self._last_use.items() if last not in kept]:
            del self._mapped[buffer], self._last_use[buffer]

    def _map(self, buffer: IpcBuffer) -> torch.Tensor:
        if self._device.type != "cuda":
            raise InvalidRequest(
                "the payload is GPU memory and this engine runs on the CPU", field="payloads"
            )
        return self._map_cuda(buffer)

    def _map_cuda(self, buffer: IpcBuffer) -> torch.Tensor:
        index = self._device.index
        index = torch.cuda.current_device() if index is None else index
        mine = str(torch.cuda.get_device_properties(index).uuid)
        if _bare(buffer.device) != _bare(mine):
            raise InvalidRequest(
                f"the payload is memory of GPU {buffer.device} and this rank runs on {mine}; CUDA "
                "IPC is for one GPU, use the 'nccl' transport",
                field="payloads",
            )
        try:
            storage = import_cuda(
                index,
                buffer.handle,
                buffer.size,
                buffer.offset,
                buffer.ref_handle,
                buffer.ref_offset,
                buffer.event,
                buffer.event_sync,
            )
        except RuntimeError as error:
            raise WeightUpdateError(
                f"the sender's GPU memory cannot be mapped ({error}): is the sender alive, in "
                "another process, and without expandable_segments in PYTORCH_CUDA_ALLOC_CONF?",
                field="payloads",
            ) from error
        empty = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index))
        return empty.set_(storage, 0, (buffer.size,), (1,))


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-")
