"""A number for a set of tensors, by which ranks tell whether they got the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch

from engine.protocol import TensorPiece

_MASK = (1 << 61) - 1
"""What ranks compare, and one more, is int64 of either sign."""


def digest_of(pieces: Iterable[TensorPiece]) -> int:
    """Of names, dtypes, shapes and elements, in [0, 2**61); their order does not matter."""
    return _digest(f"{p.name} {p.dtype} {p.shape} {p.start} {p.stop}" for p in pieces)


def digest_of_whole(dtypes: Mapping[str, torch.dtype]) -> int:
    """Of the names and dtypes of whole tensors, whose shapes are the model's; likewise."""
    return _digest(f"{name} {dtype}" for name, dtype in dtypes.items())


def _digest(lines: Iterable[str]) -> int:
    text = "\n".join(sorted(lines)).encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest()) & _MASK
