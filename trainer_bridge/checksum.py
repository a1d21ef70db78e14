"""The sender's side of tensor checksums, which `kernels.checksum` defines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from msgspec.structs import replace

from engine.protocol import TensorSpec
from kernels.checksum import checksum_into
from trainer_bridge.adapters.base import in_order


def with_checksums(
    specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
) -> list[TensorSpec]:
    """The manifest with the checksum of every tensor; waits for every device once.

    Raises ManifestMismatch where the tensors are not those of `specs`.
    """
    totals = [_total(tensor) for tensor in in_order(specs, iter(tensors))]
    # A model may lie on several GPUs, or partly in host memory.
    by_device: dict[torch.device, list[int]] = {}
    for index, total in enumerate(totals):
        by_device.setdefault(total.device, []).append(index)
    values: dict[int, int] = {}
    for members in by_device.values():
        found = torch.cat([totals[index] for index in members]).tolist()
        values.update(zip(members, found, strict=True))
    return [replace(spec, checksum=values[i] % (1 << 64)) for i, spec in enumerate(specs)]


def _total(tensor: torch.Tensor) -> torch.Tensor:
    """The checksum, int64 [1] on the tensor's device."""
    total = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    checksum_into(total, tensor.detach(), backend="triton" if tensor.is_cuda else "torch")
    return total
