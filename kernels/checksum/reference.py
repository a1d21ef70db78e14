"""The checksum in plain torch, a chunk of 2^20 elements at a time."""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
SHIFT = 1 << 33
"""Added to every x_i, so that zeros count."""
_CHUNK = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bits as integers, flat; a view where the tensor is contiguous."""
    flat = tensor.reshape(-1)
    return flat.view(_BITS[flat.element_size()])


def magnitude_mask(tensor: torch.Tensor) -> int:
    """The bits of an element without its sign."""
    return (1 << (8 * tensor.element_size() - 1)) - 1


def checksum_into(
    total: torch.Tensor, tensor: torch.Tensor, peak: torch.Tensor | None = None, start: int = 0
) -> None:
    """See `kernels.checksum.checksum_into`."""
    words = words_of(tensor)
    mask = magnitude_mask(tensor)
    for first in range(0, words.numel(), _CHUNK):
        part = words[first : first + _CHUNK]
        if peak is not None:
            torch.maximum(peak, (part & mask).amax().to(torch.int64), out=peak)
        chunk = part.to(torch.int64) + SHIFT
        total += (chunk * _multipliers(start + first, chunk.numel(), words.device)).sum()


def _multipliers(start: int, count: int, device: torch.device) -> torch.Tensor:
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z = z * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(MIX_1)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_2)
    return (z ^ _shifted(z, 31)) | 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
