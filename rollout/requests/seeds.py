"""Seeds derived from seeds: torch-free, the same on every machine and Python."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xD1342543DE82EF95


def _splitmix64(state: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _unmix(z: int) -> int:
    """The state of which `_splitmix64` made `z`: each of its steps can be undone."""
    z ^= (z >> 31) ^ (z >> 62)
    z = (z * pow(0x94D049BB133111EB, -1, 1 << 64)) & _MASK
    z ^= (z >> 27) ^ (z >> 54)
    z = (z * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & _MASK
    z ^= (z >> 30) ^ (z >> 60)
    return (z - _GOLDEN) & _MASK


def _word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return part & _MASK


def base_seed(seed: int | None, replica_id: str = "") -> int:
    """The seed that seeds of requests without one are derived from, in [0, 2**63).

    seed: the operator's, or None: drawn from the operating system then and logged, so that no
    two servers and no two starts sample alike, and a run can be repeated nevertheless.
    replica_id: set apart servers that share one `seed`; without it the seed is used as it is.
    """
    if seed is None:
        seed = secrets.randbits(63)
        logger.info("requests without a seed get seeds derived from %d (--seed repeats it)", seed)
    return derive_seed(seed, "replica", replica_id) if replica_id else seed


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


def common_base(seeds: Sequence[int]) -> int | None:
    """The base, in [-2**63, 2**63), whose children 0, 1, ... have these seeds: `derive_seed(base,
    i)` is `seeds[i]`. One seed always has one; of more, those that were not derived so have none.

    What a caller over HTTP states as `sampling_seed` to have the samples that these seeds draw.

    >>> common_base([derive_seed(7, 0), derive_seed(7, 1)]) == 7
    True
    """
    for lost_bit in (0, 1):
        state = _unmix(seeds[0] << 1 | lost_bit)
        inverse = pow(_MULTIPLIER, -1, 1 << 64)
        base = _unmix(((state - _splitmix64(0)) * inverse) & _MASK)
        if all(derive_seed(base, place) == seed for place, seed in enumerate(seeds)):
            return base - (1 << 64) if base >> 63 else base
    return None
