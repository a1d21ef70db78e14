"""A copy of device tensors in host memory that is kept from one release to the next."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from engine.errors import OutOfMemory

_ALIGNMENT = 256
_PAGE_BYTES = 4096


class HostBackup:
    """One host buffer as large as the tensors, pinned if they are on a GPU.

    It is allocated once: pinning 15 GB takes seconds, copying it 0.3. Copies run on a stream of
    their own; `wait` before the tensors are used or given up.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises OutOfMemory if the host cannot pin that much."""
        self._tensors = list(tensors)
        offsets, end = [], 0
        for tensor in self._tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._buffer = _on_page_boundary(end)
        self._stream: torch.cuda.Stream | None = None
        if self._tensors and self._tensors[0].is_cuda:
            _pin(self._buffer)
            self._unpin = weakref.finalize(self, _unpin, self._buffer.data_ptr())
            self._stream = torch.cuda.Stream(self._tensors[0].device)  # type: ignore[no-untyped-call]
        self._copies = [
            _view(self._buffer, offset, tensor)
            for offset, tensor in zip(offsets, self._tensors, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory held."""
        return len(self._buffer)

    def save(self) -> None:
        """Start copying the tensors to the host."""
        self._copy(zip(self._copies, self._tensors, strict=True))

    def restore(self) -> None:
        """Start copying the host's values into the tensors."""
        self._copy(zip(self._tensors, self._copies, strict=True))

    def wait(self) -> None:
        """Until the copies are done."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.no_grad()
    def _copy(self, pairs: zip[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)


def _on_page_boundary(num_bytes: int) -> torch.Tensor:
    """uint8 memory that can be pinned page by page."""
    raw = torch.empty(num_bytes + _PAGE_BYTES, dtype=torch.uint8)
    start = -raw.data_ptr() % _PAGE_BYTES
    return raw[start : start + num_bytes]


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    piece = buffer[offset : offset + like.nbytes]
    return piece.view(like.dtype).view(like.shape)


def _pin(buffer: torch.Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(error) != 0:
        raise OutOfMemory(
            f"memory.cpu_backup needs {buffer.nbytes / 2**30:.1f} GiB of pinned host memory, which "
            f"the host refused (CUDA error {int(error)}); turn it off or raise the limit on "
            "locked memory",
            field="memory.cpu_backup",
        )


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
