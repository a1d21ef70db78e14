"""Seeds derived from seeds: torch-free, the same on every machine and Python."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xD1342543DE82EF95


def _splitmix64(state: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return part & _MASK


def derive_seed(base: int, *parts: int | str) -> int:
    """A seed in [0, 2**63) for the child that `parts` name under `base`.

    Each part is folded in with SplitMix64, so children that differ in one part, in the
    order of the parts or in the base are unrelated. Integers count modulo 2**64.

    >>> derive_seed(7, "prompt", 3) == derive_seed(7, "prompt", 3)
    True
    """
    state = _splitmix64(base & _MASK)
    for part in parts:
        # The multiplier keeps base and part apart: f(a, b) must not be f(b, a).
        state = _splitmix64((state * _MULTIPLIER + _splitmix64(_word(part))) & _MASK)
    return state >> 1
