"""The sender's side of tensor checksums: the definition of `engine.weights.checksum`.

Written out again, since a trainer imports nothing of the engine; a test holds the two equal.
Position i of the flattened tensor, its bits read as a signed integer x_i, counts
(x_i + 2^33) * m(i) modulo 2^64, with odd multipliers m(i) from SplitMix64 of i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from msgspec.structs import replace

from engine.protocol import TensorSpec
from trainer_bridge.adapters.base import in_order

_CHUNK = 1 << 22
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def with_checksums(
    specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
) -> list[TensorSpec]:
    """The manifest with the checksum of every tensor; waits for the device once.

    Raises ManifestMismatch where the tensors are not those of `specs`.
    """
    totals = [_total(tensor) for tensor in in_order(specs, iter(tensors))]
    if not totals:
        return []
    values = torch.stack(totals).tolist()
    return [
        replace(spec, checksum=value % (1 << 64)) for spec, value in zip(specs, values, strict=True)
    ]


def _total(tensor: torch.Tensor) -> torch.Tensor:
    """The checksum as an int64 scalar on the tensor's device."""
    flat = tensor.detach().reshape(-1)
    words = flat.view(_SIGNED[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        index = torch.arange(start + 1, start + 1 + part.numel(), device=words.device)
        total = total + ((part + (1 << 33)) * _multiplier(index)).sum()
    return total


def _multiplier(index: torch.Tensor) -> torch.Tensor:
    mixed = index * _wrap(_GOLDEN)
    mixed = (mixed ^ _shift(mixed, 30)) * _wrap(_MIX_1)
    mixed = (mixed ^ _shift(mixed, 27)) * _wrap(_MIX_2)
    return (mixed ^ _shift(mixed, 31)) | 1


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
