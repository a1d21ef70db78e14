"""Arrays that a step sends through pinned memory: each arrives as it was when it was sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.transfer import Staging

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def arrays_of(step: int, size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(step)
    return [
        generator.integers(-(2**31), 2**31, (size, 7), dtype=np.int32),
        generator.integers(-5, 5, size + step % 3, dtype=np.int32),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sent_arrives_whatever_is_sent_behind_it(device: str) -> None:
    """More arrays than blocks, of sizes that grow and shrink, while the device is busy."""
    staging = Staging(torch.device(device))
    if device == "cuda":
        torch.cuda._sleep(200_000_000)
    sizes = [3, 400, 10, 10, 4000, 1, 1, 2000, 0, 5000]
    sent = []
    for step, size in enumerate(sizes):
        arrays = arrays_of(step, size)
        sent.append(staging.send(arrays))
        for array in arrays:
            array[:] = 77
    for step, (size, found) in enumerate(zip(sizes, sent, strict=True)):
        for got, want in zip(found, arrays_of(step, size), strict=True):
            assert got.dtype == torch.int32 and got.device.type == device
            np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_every_array_begins_as_far_in_as_any_other(device: str) -> None:
    """A Triton kernel is compiled anew for a pointer that no 16 divides."""
    staging = Staging(torch.device(device))
    for size in (1, 2, 3, 50):
        assert all(tensor.data_ptr() % 16 == 0 for tensor in staging.send(arrays_of(0, size)))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_of_the_host_is_used_again(device: str) -> None:
    staging = Staging(torch.device(device))
    staging.send(arrays_of(0, 100))
    staging.send(arrays_of(1, 100))
    owned = {block.memory.data_ptr() for block in staging._blocks if block is not None}
    assert len(owned) == 2
    for step in range(5):
        staging.send(arrays_of(step, 90))
    assert owned == {block.memory.data_ptr() for block in staging._blocks if block is not None}
