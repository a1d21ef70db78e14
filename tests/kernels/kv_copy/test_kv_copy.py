"""KV writes and page copies against plain loops, and Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_copy import copy_pages, write_kv
from kernels.testing import assert_close, poison, triton_device

PAGES, SIZE = 7, 4


def make(kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"):
    k, v = torch.randn(2, 11, kv_heads, head_dim).to(device, dtype)
    slots = torch.randperm(PAGES * SIZE)[:11]
    slots[[2, 8]] = -1
    pages = [poison(torch.empty(PAGES, SIZE, kv_heads, head_dim, dtype=dtype)) for _ in "kv"]
    return k, v, pages[0].to(device), pages[1].to(device), slots.to(device)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dims", [(1, 16), (3, 63)])
def test_reference_writes_its_slots_and_no_other(
    dims: tuple[int, int], slot_dtype: torch.dtype
) -> None:
    k, v, k_pages, v_pages, slots = make(*dims, torch.float32)
    want_k, want_v = k_pages.clone(), v_pages.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want_k[slot // SIZE, slot % SIZE] = k[token]
            want_v[slot // SIZE, slot % SIZE] = v[token]
    write_kv(k, v, k_pages, v_pages, slots.to(slot_dtype), backend="torch")
    assert torch.equal(k_pages.nan_to_num(9.0), want_k.nan_to_num(9.0))
    assert torch.equal(v_pages.nan_to_num(9.0), want_v.nan_to_num(9.0))


def test_writing_nothing_changes_nothing() -> None:
    k, v, k_pages, v_pages, slots = make(1, 8, torch.float32)
    write_kv(k, v, k_pages, v_pages, torch.full_like(slots, -1), backend="torch")
    write_kv(k[:0], v[:0], k_pages, v_pages, slots[:0], backend="torch")
    assert k_pages.isnan().all() and v_pages.isnan().all()


def test_copy_pages_reads_every_source_before_it_writes() -> None:
    k_pages, v_pages = torch.randn(2, 3, PAGES, SIZE, 2, 8)
    before_k, before_v = k_pages.clone(), v_pages.clone()
    src, dst = torch.tensor([1, 2, 5]), torch.tensor([2, 1, 0])
    copy_pages([k_pages, v_pages], src.int(), dst.int())
    for layer in range(3):
        for a, b in zip(src.tolist(), dst.tolist(), strict=True):
            assert torch.equal(k_pages[layer, b], before_k[layer, a])
            assert torch.equal(v_pages[layer, b], before_v[layer, a])
    assert torch.equal(k_pages[:, 3:], before_k[:, 3:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(1, 16), (3, 63), (8, 128)])
def test_triton_matches_reference(dims: tuple[int, int], dtype: torch.dtype) -> None:
    k, v, k_pages, v_pages, slots = make(*dims, dtype, triton_device())
    want_k, want_v = k_pages.clone(), v_pages.clone()
    write_kv(k, v, want_k, want_v, slots, backend="torch")
    write_kv(k, v, k_pages, v_pages, slots.int(), backend="triton")
    assert torch.equal(k_pages.nan_to_num(9.0), want_k.nan_to_num(9.0))
    assert torch.equal(v_pages.nan_to_num(9.0), want_v.nan_to_num(9.0))


@pytest.mark.gpu
def test_triton_addresses_pools_beyond_two_gibi_elements() -> None:
    if triton_device() == "cpu":
        pytest.skip("4 GiB of pages: only on a GPU")
    heads, head_dim = 8, 128
    num_pages = 2**31 // (16 * heads * head_dim) + 2
    pages = torch.empty(num_pages, 16, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    k = torch.randn(2, heads, head_dim, device="cuda").bfloat16()
    slots = torch.tensor([0, num_pages * 16 - 1], device="cuda")
    write_kv(k, k, pages, pages, slots, backend="triton")
    assert_close("last slot", pages[-1, -1], k[1], k.dtype)
    assert_close("first slot", pages[0, 0], k[0], k.dtype)
