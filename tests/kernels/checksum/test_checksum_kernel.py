"""The checksum op: reference against plain integers elsewhere, Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.checksum import checksum_into
from kernels.testing import triton_device


def total_of(tensor: torch.Tensor, backend: str) -> int:
    total = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    checksum_into(total, tensor, backend=backend)
    return int(total)


def test_it_adds_to_what_is_there() -> None:
    tensor = torch.randn(63)
    total = torch.full((1,), 5, dtype=torch.int64)
    checksum_into(total, tensor, backend="torch")
    assert int(total) == total_of(tensor, "torch") + 5


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend"):
        checksum_into(torch.zeros(1, dtype=torch.int64), torch.zeros(1), backend="cublas")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize("size", [0, 1, 63, 100_003, 5_000_001])
def test_triton_sums_like_the_reference(size: int, dtype: torch.dtype) -> None:
    tensor = (torch.randn(size) * 50).to(dtype)
    got = total_of(tensor.to(triton_device()), "triton")
    assert got == total_of(tensor, "torch")
