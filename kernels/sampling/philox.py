"""Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011), on int64 tensors.

A 32-bit word lives in the low half of an int64. There is no state:
the same key and counter always give the same words, on every device.
"""

from __future__ import annotations

import torch

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox_4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Ten rounds; words are int64 tensors of one shape, each in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit product wraps into the sign bit; the mask undoes the sign extension.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c2 = (product_1 >> 32 & _LOW) ^ c1 ^ k0, (product_0 >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = k0 + WEYL_0 & _LOW, k1 + WEYL_1 & _LOW
    return c0, c1, c2, c3


def philox_uniform(seed_S: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """One float64 in (0, 1) for each (seed, position); both int64, any value, same shape.

    Key: the 64 bits of the seed. Counter: the 64 bits of the position, then zeros. The first
    52 bits of the result, plus one half, over 2^52: never 0, never 1.
    """
    zero_S = torch.zeros_like(position_S)
    counter = (position_S & _LOW, position_S >> 32 & _LOW, zero_S, zero_S)
    high_S, low_S, _, _ = philox_4x32(counter, (seed_S & _LOW, seed_S >> 32 & _LOW))
    bits_S = (high_S << 20) | (low_S >> 12)
    return (bits_S.double() + 0.5) * 2.0**-52
