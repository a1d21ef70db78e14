"""A 64-bit checksum of a tensor's bits, computed where the tensor lives.

The elements' bit patterns x_i, shifted to be non-zero, are weighted by odd multipliers
m(i) of their position and summed modulo 2^64. Exact integer arithmetic: the value is the
same on every device. m is SplitMix64 (Steele, Lea and Flood 2014), so that moved, swapped
and changed elements all show. It guards against accidents, not against forgery.
"""

from __future__ import annotations

import torch

_CHUNK = 1 << 20
_MASK = (1 << 64) - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _multipliers(start: int, count: int, device: torch.device) -> torch.Tensor:
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z = z * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shifted(z, 31)) | 1


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor of any dtype, shape and device, in [0, 2^64).

    Depends on the elements' bits and order, not on the shape. Needs memory for a chunk of
    2^20 elements; waits for the device once.
    """
    flat = tensor.detach().reshape(-1)
    words = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64) + (1 << 33)
        total = total + (chunk * _multipliers(start, chunk.numel(), words.device)).sum()
    return int(total) & _MASK
