"""A 64-bit checksum of a tensor's bits, computed where the tensor lives.

`kernels.checksum` defines it. It guards against accidents, not against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from kernels.checksum import checksum_into

_MASK = (1 << 64) - 1
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Queued:
    """scan: int64 [2] on the tensor's device, its checksum and the bits of its peak."""

    scan: torch.Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Scanned:
    """checksum: in [0, 2^64). peak: largest magnitude of a float tensor, NaN if any is NaN."""

    checksum: int
    peak: float
    dtype: torch.dtype


class Checksums:
    """Checksums and peaks of named tensors, each read once where it lives; `scans` waits for
    the device once."""

    def __init__(self) -> None:
        self._queued: dict[tuple[str, int], _Queued] = {}
        self._names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Queue the scan of a tensor, which may be overwritten by whatever is queued later.

        start: its first element's place in what has the name, where that is read in parts. A part
        that is added again, which was read too early, replaces the one before.
        """
        scan = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        checksum_into(
            scan[:1],
            tensor.detach(),
            backend="triton" if tensor.is_cuda else "torch",
            peak=scan[1:],
            start=start,
        )
        self._queued[name, start] = _Queued(scan, tensor.dtype)
        self._names.add(name)

    def scans(self) -> dict[str, Scanned]:
        """Checksum and peak of every tensor by name, in the order they were added."""
        by_device: dict[torch.device, list[tuple[str, int]]] = {}
        for key, queued in self._queued.items():
            by_device.setdefault(queued.scan.device, []).append(key)
        totals = {name: (0, 0) for name, _ in self._queued}
        for keys in by_device.values():
            rows = torch.stack([self._queued[key].scan for key in keys]).tolist()
            for (name, _), (total, bits) in zip(keys, rows, strict=True):
                before, most = totals[name]
                totals[name] = before + total, max(most, bits)
        dtypes = {name: queued.dtype for (name, _), queued in self._queued.items()}
        return {
            name: Scanned(total & _MASK, _magnitude(bits, dtypes[name]), dtypes[name])
            for name, (total, bits) in totals.items()
        }


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor of any dtype, shape and device, in [0, 2^64).

    Depends on the elements' bits and order, not on the shape. Waits for the device.
    """
    return checksums([("", tensor)])[""]


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """The checksum of each named tensor; waits for the device once."""
    sums = Checksums()
    for name, tensor in tensors:
        sums.add(name, tensor)
    return {name: scanned.checksum for name, scanned in sums.scans().items()}


def stored_checksums(units: Iterable[tuple[str, Sequence[torch.Tensor]]]) -> dict[str, int]:
    """One checksum of all that is stored for each unit: the elements of its storages one behind
    the other, whatever their dtypes; 0 of nothing. Waits for the device once."""
    sums, found = Checksums(), {}
    for name, storages in units:
        found[name] = start = 0
        for storage in storages:
            sums.add(name, storage, start)
            start += storage.numel()
    return found | {name: scanned.checksum for name, scanned in sums.scans().items()}


def _magnitude(bits: int, dtype: torch.dtype) -> float:
    """The float of `dtype` that has these bits; 0 for a dtype that is none."""
    if not dtype.is_floating_point:
        return 0.0
    word = torch.tensor([bits], dtype=torch.int64).to(_WORDS[dtype.itemsize])
    return float(word.view(dtype).double())
