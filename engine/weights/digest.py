"""A number for a set of tensors, by which ranks tell whether they got the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from engine.protocol import TensorPiece

_MASK = (1 << 61) - 1
"""Sums stay below 2**62, and so does a number after them, in int64 of either sign."""


def digest_of(pieces: Iterable[TensorPiece]) -> int:
    """Of names, dtypes, shapes and elements, in [0, 2**61); their order does not matter."""
    total = 0
    for piece in pieces:
        total += _one(f"{piece.name} {piece.dtype} {piece.shape} {piece.start} {piece.stop}")
    return total & _MASK


def with_tensor(digest: int, name: str, dtype: object, shape: Iterable[int]) -> int:
    """The digest of the same tensors and one more."""
    return (digest + _one(f"{name} {dtype} {tuple(shape)}")) & _MASK


def _one(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
