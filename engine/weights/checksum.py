"""A 64-bit checksum of a tensor's bits, computed where the tensor lives.

`kernels.checksum` defines it. It guards against accidents, not against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kernels.checksum import checksum_into

_MASK = (1 << 64) - 1


class Checksums:
    """Checksums of named tensors, queued on their device; `values` waits for it once."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue the checksum of a tensor, which may be overwritten by whatever is queued later."""
        total = torch.zeros(1, dtype=torch.int64, device=tensor.device)
        checksum_into(total, tensor.detach(), backend="triton" if tensor.is_cuda else "torch")
        self._totals[name] = total

    def values(self) -> dict[str, int]:
        """Every checksum by name, in [0, 2^64)."""
        by_device: dict[torch.device, list[str]] = {}
        for name, total in self._totals.items():
            by_device.setdefault(total.device, []).append(name)
        values: dict[str, int] = {}
        for names in by_device.values():
            totals = torch.cat([self._totals[name] for name in names]).tolist()
            values.update({n: t & _MASK for n, t in zip(names, totals, strict=True)})
        return {name: values[name] for name in self._totals}


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
    return sums.values()
