"""What an update replaces, kept until it is committed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from engine.errors import OutOfMemory
from engine.weights.catalog import LARGE_BYTES, Catalog

_ALIGNMENT = 256


class UndoCopy:
    """This rank's old values of some tensors, in one piece of memory: the next update finds it
    again in torch's cache, whatever its order."""

    def __init__(self, num_bytes: int, num_tensors: int, device: torch.device) -> None:
        self._size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT + num_tensors * _ALIGNMENT
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._end = 0
        self._kept: dict[str, torch.Tensor] = {}
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def reserve(self) -> None:
        """Take the memory, before anything is replaced.

        Raises OutOfMemory. Idempotent.
        """
        if self._memory.numel():
            return
        try:
            self._memory = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"no {self._size / 2**30:.2f} GiB for an undo copy ({error}); begin with mode "
                "'in_place', or give the KV pool less",
                field="mode",
            ) from error

    def without(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that were not kept yet: what is there a second time may be half of
        what came."""
        return [name for name in names if name not in self._kept]

    @torch.no_grad()
    def keep(self, live: Mapping[str, torch.Tensor]) -> None:
        """Copy live tensors that were not kept, in the order of the current stream."""
        if not live:
            return
        self.reserve()
        kept = {name: self._room_for(tensor) for name, tensor in live.items()}
        small = [name for name, tensor in live.items() if tensor.nbytes < LARGE_BYTES]
        if small:
            targets, sources = [kept[name] for name in small], [live[name] for name in small]
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for name, tensor in live.items():
            if tensor.nbytes >= LARGE_BYTES:
                kept[name].copy_(tensor, non_blocking=True)
        self._kept.update(kept)

    def keep_one(self, name: str, live: torch.Tensor) -> None:
        """`keep` of a single tensor, a view without a gradient."""
        if name in self._kept:
            return
        self.reserve()
        self._kept[name] = self._room_for(live).copy_(live, non_blocking=True)

    def _room_for(self, live: torch.Tensor) -> torch.Tensor:
        start = self._end // live.element_size()
        self._end += -(-live.nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._as(live.dtype).as_strided(live.shape, _strides(live.shape), start)

    @torch.no_grad()
    def put_back(self, catalog: Catalog) -> None:
        """Write the old values again, and wait for the device."""
        for name, kept in self._kept.items():
            catalog.view(name).copy_(kept)
        if self._kept and self._memory.is_cuda:
            torch.cuda.current_stream(self._memory.device).synchronize()

    def _as(self, dtype: torch.dtype) -> torch.Tensor:
        """The memory as elements of a dtype; made once, for thousands of tensors."""
        if dtype not in self._typed:
            self._typed[dtype] = self._memory.view(dtype)
        return self._typed[dtype]

    def has(self, names: set[str]) -> bool:
        """Whether the old values of all of `names` were kept."""
        return names <= self._kept.keys()


def _strides(shape: torch.Size) -> list[int]:
    """Of contiguous elements in row-major order."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides
