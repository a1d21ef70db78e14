"""Embedding and norm in one op against the two."""

from __future__ import annotations

import pytest
import torch

from kernels.embedding import embed_rms_norm
from kernels.norm import rms_norm
from kernels.testing import assert_close, poisoned_allocations, triton_device

EPS = 1e-5


def make(width: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    ids = torch.tensor([3, 0, 6, 3]).to(device)
    table, weight = torch.randn(7, width), torch.rand(width) + 0.5
    return [ids, table.to(device, dtype), weight.to(device, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_looks_up_and_normalises(dtype: torch.dtype) -> None:
    ids, table, weight = make(63, dtype)
    normed, rows = embed_rms_norm(ids, table, weight, EPS, backend="torch")
    assert torch.equal(rows, table[ids])
    assert torch.equal(normed, rms_norm(table[ids], weight, EPS, backend="torch"))


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="torch, triton; got 'numpy'"):
        embed_rms_norm(*make(4, torch.float32), EPS, backend="numpy")


@pytest.mark.gpu
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 100, 576])
def test_triton_is_bit_equal_to_the_separate_kernels(
    width: int, dtype: torch.dtype, id_dtype: torch.dtype
) -> None:
    ids, table, weight = make(width, dtype, triton_device())
    with poisoned_allocations():
        normed, rows = embed_rms_norm(ids.to(id_dtype), table, weight, EPS, backend="triton")
    assert torch.equal(rows, table[ids])
    assert torch.equal(normed, rms_norm(table[ids], weight, EPS, backend="triton"))
    want, _ = embed_rms_norm(ids, table, weight, EPS, backend="torch")
    assert_close("normed", normed, want, dtype)


@pytest.mark.gpu
def test_no_tokens_give_no_rows() -> None:
    ids, table, weight = make(16, torch.float32, triton_device())
    normed, rows = embed_rms_norm(ids[:0], table, weight, EPS, backend="triton")
    assert normed.shape == rows.shape == (0, 16)
