"""Handles of memory that was shared with another process, kept as long as that memory is there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.protocol import IpcBuffer
from kernels.torch_compat import WeakStorage, weakly

_BUFFER_ID = 7
"""CU_POINTER_ATTRIBUTE_BUFFER_ID of the CUDA driver: differs for any two allocations of a
process, also where the second has the address of the first."""


@dataclass(frozen=True)
class _Exported:
    """What was exported, and the memory that it was exported of."""

    storage: WeakStorage
    memory: tuple[int, int, int]
    buffer: IpcBuffer


class HandleCache:
    """Exports each storage once, so that a receiver that mapped it knows it again.

    A handle is of one allocation. It is given again only for the same storage object with the
    same memory: weights that were moved away and back have other memory, also where it has the
    address and size of the old. The cache keeps no storage alive.

    export: makes the handle of a storage. allocation: number of the allocation that an address
    is in.
    """

    def __init__(
        self,
        export: Callable[[torch.UntypedStorage], IpcBuffer],
        allocation: Callable[[int], int],
    ) -> None:
        self._export = export
        self._allocation = allocation
        self._exported: dict[int, _Exported] = {}

    def __len__(self) -> int:
        return len(self._exported)

    def buffer_of(self, storage: torch.UntypedStorage) -> IpcBuffer:
        """The handle of a storage, made now if there is none that holds."""
        address = storage.data_ptr()
        memory = (address, storage.nbytes(), self._allocation(address))
        reference = weakly(storage)
        known = self._exported.get(reference.cdata)
        if known is None or known.storage.expired() or known.memory != memory:
            known = _Exported(reference, memory, self._export(storage))
            self._exported[reference.cdata] = known
        return known.buffer

    def forget_freed(self) -> None:
        """Drop the handles of storages that are gone."""
        freed = [key for key, known in self._exported.items() if known.storage.expired()]
        for key in freed:
            del self._exported[key]

    def clear(self) -> None:
        """Forget everything."""
        self._exported.clear()


class CudaAllocations:
    """Numbers of this process's allocations on a GPU, as the driver counts them."""

    def __init__(self) -> None:
        self._driver: ctypes.CDLL | None = None

    def __call__(self, address: int) -> int:
        """The number of the allocation that a device address is in.

        Raises OSError where there is no driver, RuntimeError for an address that is none of a
        GPU's.
        """
        if self._driver is None:
            self._driver = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_ulonglong()
        code = self._driver.cuPointerGetAttribute(
            ctypes.byref(number), _BUFFER_ID, ctypes.c_ulonglong(address)
        )
        if code != 0:
            raise RuntimeError(f"the CUDA driver does not know address {address:#x}: error {code}")
        return int(number.value)
