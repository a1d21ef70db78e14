"""Philox against its published answers and an independent big-integer version."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.sampling import philox_uniform
from kernels.sampling.philox import philox_4x32
from kernels.testing import triton_device

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""(counter, key, output) for ten rounds, from the kat_vectors file of Random123."""

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]


def with_integers(seed: int, position: int) -> float:
    counter = [position % 2**64 % 2**32, position % 2**64 // 2**32, 0, 0]
    key = [seed % 2**64 % 2**32, seed % 2**64 // 2**32]
    for _ in range(10):
        high_0, low_0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return (((counter[0] << 32 | counter[1]) >> 12) + 0.5) / 2**52


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], want: tuple[int, ...]
) -> None:
    words = philox_4x32(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key)
    )
    assert tuple(int(word) for word in words) == want


def test_uniform_equals_big_integers_for_any_sixty_four_bits() -> None:
    pairs = [(seed, position) for seed in SEEDS for position in (0, 5, 2**40 + 3, -7)]
    pairs += [(random.getrandbits(63), random.getrandbits(63)) for _ in range(50)]
    seed, position = torch.tensor(pairs).T
    want = torch.tensor([with_integers(*pair) for pair in pairs], dtype=torch.float64)
    assert torch.equal(philox_uniform(seed, position), want)


def test_uniform_is_uniform_and_open() -> None:
    position = torch.arange(20000)
    for seed in (3, 4):
        uniform = philox_uniform(torch.full_like(position, seed), position)
        assert uniform.min() > 0 and uniform.max() < 1
        counts = torch.histc(uniform.float(), 20, 0, 1)
        assert ((counts - 1000).square() / 1000).sum() < 50  # 19 degrees: p < 0.0002
    first = philox_uniform(torch.arange(20000), torch.zeros_like(position))
    assert abs(float(torch.corrcoef(torch.stack((first[:-1], first[1:])))[0, 1])) < 0.03


def test_extreme_words_stay_inside() -> None:
    """The largest 52 bits, plus one half, must not round up to 1."""
    top = torch.tensor([2**52 - 1])
    assert ((top.double() + 0.5) * 2.0**-52 < 1).all()


@pytest.mark.gpu
def test_triton_is_bit_equal() -> None:
    from kernels.sampling import triton as sampling_triton

    seed = torch.randint(-(2**62), 2**62, (300,))
    seed[: len(SEEDS)] = torch.tensor(SEEDS)
    position = torch.randint(0, 2**40, (300,))
    device = triton_device()
    got = sampling_triton.philox_uniform(seed.to(device), position.to(device))
    assert torch.equal(got.cpu(), philox_uniform(seed, position))
