"""What an update replaces, kept until it is committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.errors import OutOfMemory
from engine.transfer import wait_for
from engine.weights.catalog import Catalog, copy_each
from kernels.torch_compat import ran_out_of_memory

_ALIGNMENT = 256
_AT_ONCE = 256
"""Units whose views are there at a time; see `_starts`."""


class UndoCopy:
    """What this rank stored for some units, in one piece of memory: the next update finds it
    again in torch's cache, whatever its order.

    num_views: storages of all units, or parts of them, that are kept one by one.
    """

    def __init__(self, num_bytes: int, num_views: int, device: torch.device) -> None:
        self._size = _aligned(num_bytes) + num_views * _ALIGNMENT
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._starts: dict[str, int] = {}
        """First byte of what was kept of each unit, its storages one behind the other. No views:
        tens of thousands of objects that stay slow down every collection of garbage."""
        self._end = 0

    def reserve(self) -> None:
        """Take the memory, before anything is replaced.

        Raises OutOfMemory. Idempotent.
        """
        if self._memory.numel():
            return
        try:
            self._memory = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"no {self._size / 2**30:.2f} GiB for an undo copy ({error}); begin with mode "
                "'in_place', or give the KV pool less",
                field="mode",
            ) from error

    def keep(self, names: Iterable[str], catalog: Catalog) -> None:
        """Copy what is live of the units `names`, in the order of the current stream.

        What was kept before is left out: what is live now may be half of what came.
        Raises OutOfMemory.
        """
        fresh = [n for n in names if n not in self._starts and catalog.held_bytes(n)]
        if not fresh:
            return
        self.reserve()
        fresh = list(dict.fromkeys(fresh))
        for first in range(0, len(fresh), _AT_ONCE):
            self._keep_some(fresh[first : first + _AT_ONCE], catalog)

    def _keep_some(self, names: Sequence[str], catalog: Catalog) -> None:
        starts: dict[str, int] = {}
        views: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        end = self._end
        for name in names:
            starts[name] = end
            for live in catalog.views(name):
                views.append(live)
                kept.append(self._at(end, live))
                end += _aligned(live.nbytes)
        copy_each(kept, views)
        self._starts.update(starts)
        self._end = end

    def put_back(self, catalog: Catalog) -> None:
        """Write the old values again, and wait for the device."""
        views: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for name, start in self._starts.items():
            for live in catalog.views(name):
                views.append(live)
                kept.append(self._at(start, live))
                start += _aligned(live.nbytes)
        copy_each(views, kept)
        if kept:
            wait_for(self._memory.device)

    def _at(self, start: int, live: torch.Tensor) -> torch.Tensor:
        """The memory from byte `start` on, as contiguous elements like those of `live`."""
        if live.dtype not in self._typed:
            self._typed[live.dtype] = self._memory.view(live.dtype)
        typed = self._typed[live.dtype]
        return typed.as_strided(live.shape, _strides(live.shape), start // live.element_size())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _strides(shape: torch.Size) -> list[int]:
    """Of contiguous elements in row-major order."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides
