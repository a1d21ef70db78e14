"""The checksum sees every change of a tensor's bits, and is one value everywhere."""

from __future__ import annotations

import pytest
import torch

from engine.weights.checksum import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def plain(words: list[int]) -> int:
    """The same sum in Python integers."""
    mask = (1 << 64) - 1
    total = 0
    for position, word in enumerate(words, start=1):
        z = position * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        total += (word + (1 << 33)) * ((z ^ z >> 31) | 1)
    return total & mask


def test_it_is_the_stated_sum() -> None:
    tensor = torch.randn(63)
    assert checksum(tensor) == plain(tensor.view(torch.int32).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_or_swapped_element_shows(dtype: torch.dtype) -> None:
    tensor = (torch.randn(10, 10) * 50).to(dtype)
    value = checksum(tensor)
    changed, swapped = tensor.clone(), tensor.clone()
    changed[7, 3] += 1
    swapped[0, 0], swapped[9, 9] = 1, 2
    twin = swapped.clone()
    twin[0, 0], twin[9, 9] = 2, 1
    assert checksum(changed) != value
    assert checksum(twin) != checksum(swapped)
    assert checksum(tensor.clone()) == value


def test_zeros_count() -> None:
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))
    assert checksum(torch.zeros(0)) == 0


def test_strides_do_not_matter_and_chunks_join() -> None:
    tensor = torch.randn(1100, 1000)
    assert checksum(tensor.T.contiguous().T) == checksum(tensor)
    split = tensor.clone()
    split[-1, -1] += 1
    assert checksum(split) != checksum(tensor)


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    tensor = torch.randn(1 << 21).to(torch.bfloat16)
    assert checksum(tensor.cuda()) == checksum(tensor)
