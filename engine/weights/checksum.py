"""A 64-bit checksum of a tensor's bits, computed where the tensor lives.

`kernels.checksum` defines it. It guards against accidents, not against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        self._queued: dict[str, _Queued] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._queued

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue the scan of a tensor, which may be overwritten by whatever is queued later."""
        scan = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        checksum_into(
            scan[:1],
            tensor.detach(),
            backend="triton" if tensor.is_cuda else "torch",
            peak=scan[1:],
        )
        self._queued[name] = _Queued(scan, tensor.dtype)

    def scans(self) -> dict[str, Scanned]:
        """Checksum and peak of every tensor by name, in the order they were added."""
        by_device: dict[torch.device, list[str]] = {}
        for name, queued in self._queued.items():
            by_device.setdefault(queued.scan.device, []).append(name)
        found: dict[str, Scanned] = {}
        for names in by_device.values():
            rows = torch.stack([self._queued[name].scan for name in names]).tolist()
            for name, (total, bits) in zip(names, rows, strict=True):
                dtype = self._queued[name].dtype
                found[name] = Scanned(total & _MASK, _magnitude(bits, dtype), dtype)
        return {name: found[name] for name in self._queued}


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


def _magnitude(bits: int, dtype: torch.dtype) -> float:
    """The float of `dtype` that has these bits; 0 for a dtype that is none."""
    if not dtype.is_floating_point:
        return 0.0
    word = torch.tensor([bits], dtype=torch.int64).to(_WORDS[dtype.itemsize])
    return float(word.view(dtype).double())
