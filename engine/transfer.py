"""Arrays between host and GPU without making either wait for the other.

A copy from or to ordinary memory stalls the host until the GPU has caught up; one from or to
pinned memory is queued like a kernel. torch keeps a pinned block from reuse until the copies
that touch it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_ALIGNED = 64
"""Every array of a copy begins at a multiple of so many numbers: kernels are compiled anew for
pointers of another alignment."""


def wait_for(device: torch.device) -> None:
    """Wait for what is queued on the current stream of `device`, so that another thread, stream
    or process may go on from here."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class _Block:
    """int32 memory of the host, and when the last copy from it is done; None on a CPU."""

    memory: torch.Tensor
    copied: torch.cuda.Event | None


_FOR_THREADS = 1 << 20


class Staging:
    """Pinned memory through which a step's larger arrays go to the device, used again by the next.

    Two blocks take turns, so that one may be written while the copy from the other is queued. A
    call waits only for the copy of the call before the last.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[_Block | None] = [None, None]

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """int32 arrays as tensors of their shapes on the device, by one copy in stream order. The
        arrays may be changed at once."""
        sizes = [-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]
        block = self._free_block(sum(sizes))
        sent = torch.empty(sum(sizes), dtype=torch.int32, device=self._device)
        places = np.cumsum([0, *sizes])
        memory = block.memory.numpy()
        for at, array in zip(places.tolist(), arrays, strict=False):
            _copy(memory[at : at + array.size].reshape(array.shape), array)
        sent.copy_(block.memory[: len(sent)], non_blocking=True)
        if block.copied is not None:
            block.copied.record()
        return [
            sent[at : at + array.size].view(array.shape)
            for at, array in zip(places.tolist(), arrays, strict=False)
        ]

    def _free_block(self, size: int) -> _Block:
        """The block whose turn it is, of at least so many numbers, which no copy reads."""
        block = self._blocks.pop(0)
        if block is not None and block.copied is not None:
            block.copied.synchronize()
        if block is None or len(block.memory) < size:
            pinned = self._device.type == "cuda"
            memory = torch.empty(size + size // 4, dtype=torch.int32, pin_memory=pinned)
            block = _Block(memory, torch.cuda.Event() if pinned else None)
        self._blocks.append(block)
        return block


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy int32 numbers; what is large by torch, which has several threads for it."""
    # What came in a frame cannot be written, which torch would warn of.
    if source.nbytes < _FOR_THREADS or not source.flags.writeable:
        np.copyto(target, source, casting="no")
    else:
        torch.from_numpy(target).copy_(torch.from_numpy(source))


class Fetch:
    """A tensor on its way to the host, copied in stream order after what is queued now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numpy(self) -> np.ndarray:
        """The values; waits for this copy and for nothing queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
