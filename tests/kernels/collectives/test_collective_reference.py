"""What the collectives compute, on what all ranks hold."""

from __future__ import annotations

import pytest
import torch

from kernels.collectives import reference
from kernels.norm import add_rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts(size: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_added_in_the_order_of_the_ranks_and_rounded_once(dtype: torch.dtype) -> None:
    held = parts(4, 5, 6, dtype=dtype)
    wide = [part.float() for part in held]
    want = (((wide[0] + wide[1]) + wide[2]) + wide[3]).to(dtype)
    assert torch.equal(reference.all_reduce(held), want)
    if dtype == torch.bfloat16:
        rounded = held[0] + held[1] + held[2] + held[3]
        assert not torch.equal(rounded, want), "the inputs tell nothing"


def test_float64_is_added_as_it_is() -> None:
    held = parts(2, 3, dtype=torch.float64)
    assert torch.equal(reference.all_reduce(held), held[0] + held[1])


def test_rows_are_gathered_and_scattered_by_rank() -> None:
    held = parts(3, 6, 5)
    gathered = reference.all_gather_rows(held)
    assert gathered.shape == (18, 5)
    assert torch.equal(gathered[6:12], held[1])
    own = [reference.reduce_scatter_rows(held, rank) for rank in range(3)]
    assert torch.equal(torch.cat(own), reference.all_reduce(held))


def test_the_fused_norm_is_that_of_the_rounded_sum() -> None:
    held, (residual,) = parts(2, 4, 64, dtype=torch.bfloat16), parts(1, 4, 64, dtype=torch.bfloat16)
    weight = torch.rand(64).to(torch.bfloat16)
    got = reference.all_reduce_add_rms_norm(held, residual, weight, 1e-5)
    want = add_rms_norm(reference.all_reduce(held), residual, weight, 1e-5, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
