"""Head norms, rotation and KV write in one op, against the three that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.kv_copy import write_kv
from kernels.norm import rms_norm
from kernels.rotary import HeadNorms, KVTarget, apply_rotary, rotate_and_store
from kernels.testing import assert_close, poison, poisoned_allocations, triton_device
from kernels.weighting import Weighting

DIMS = [(1, 1, 16), (9, 3, 64), (4, 2, 80), (3, 1, 12)]
TOKENS, PAGES, SIZE = 11, 7, 4


def make(dims: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", norm: bool = False):
    """A projection that is a slice, positions out of order, two tokens without a slot."""
    heads, kv_heads, head_dim = dims
    columns = (heads + 2 * kv_heads) * head_dim
    qkv = torch.randn(TOKENS, columns + 8).to(device, dtype)[:, :columns]
    positions = torch.randperm(100)[:TOKENS].to(device)
    angle = torch.rand(100, head_dim // 2) * 6.3
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
    slots = torch.randperm(PAGES * SIZE)[:TOKENS]
    slots[[2, 8]] = -1
    norms = None
    if norm:
        weights = (torch.rand(2, head_dim) + 0.5).to(device, dtype)
        norms = HeadNorms(weights[0], weights[1], 1e-5)
    return qkv, positions, cos_sin, slots.to(device), norms


def target_for(dims: tuple[int, int, int], dtype: torch.dtype, slots: torch.Tensor) -> KVTarget:
    shape = (PAGES, SIZE, *dims[1:])
    pages = [poison(torch.empty(shape, dtype=dtype, device=slots.device)) for _ in "kv"]
    return KVTarget(pages[0], pages[1], slots)


def separately(qkv, positions, cos_sin, target, norms, dims, backend, wide=False):
    heads, kv_heads, head_dim = dims
    parts = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    q, k, v = parts
    if norms is not None:
        options = {"weighting": norms.weighting, "backend": backend}
        q = rms_norm(q, norms.q_weight_D, norms.eps, **options)
        k = rms_norm(k, norms.k_weight_D, norms.eps, **options)
    q, k = apply_rotary(q, k, positions, cos_sin, wide=wide, backend=backend)
    write_kv(k, v, target.k_pages_NGKD, target.v_pages_NGKD, target.slots_T, backend=backend)
    return q


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", DIMS)
def test_reference_is_the_three_ops(
    dims: tuple[int, int, int], dtype: torch.dtype, norm: bool
) -> None:
    qkv, positions, cos_sin, slots, norms = make(dims, dtype, norm=norm)
    want_target, target = target_for(dims, dtype, slots), target_for(dims, dtype, slots)
    want = separately(qkv, positions, cos_sin, want_target, norms, dims, "torch")
    got = rotate_and_store(qkv, positions, cos_sin, target, norms=norms, backend="torch")
    assert torch.equal(got, want)
    for mine, theirs in (
        (target.k_pages_NGKD, want_target.k_pages_NGKD),
        (target.v_pages_NGKD, want_target.v_pages_NGKD),
    ):
        assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["wide", "offset"])
def test_reference_is_the_three_ops_of_other_roundings(
    weighting: Weighting, dtype: torch.dtype
) -> None:
    dims = (9, 3, 64)
    qkv, positions, cos_sin, slots, norms = make(dims, dtype, norm=True)
    norms = replace(norms, weighting=weighting)
    want_target, target = target_for(dims, dtype, slots), target_for(dims, dtype, slots)
    want = separately(qkv, positions, cos_sin, want_target, norms, dims, "torch", wide=True)
    options = {"norms": norms, "wide": True, "backend": "torch"}
    assert torch.equal(rotate_and_store(qkv, positions, cos_sin, target, **options), want)
    keys, want_keys = (t.k_pages_NGKD.nan_to_num(9.0) for t in (target, want_target))
    assert torch.equal(keys, want_keys)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["rounded", "wide", "offset"])
@pytest.mark.parametrize("wide", [False, True])
def test_triton_rounds_as_the_reference(
    wide: bool, weighting: Weighting, dtype: torch.dtype
) -> None:
    dims = (9, 3, 64)
    qkv, positions, cos_sin, slots, norms = make(dims, dtype, triton_device(), True)
    norms = replace(norms, weighting=weighting)
    want_target, target = target_for(dims, dtype, slots), target_for(dims, dtype, slots)
    options = {"norms": norms, "wide": wide}
    want = rotate_and_store(qkv, positions, cos_sin, want_target, **options, backend="torch")
    with poisoned_allocations():
        got = rotate_and_store(qkv, positions, cos_sin, target, **options, backend="triton")
    assert_close("queries", got, want, dtype)
    keys, want_keys = (t.k_pages_NGKD.nan_to_num(9.0) for t in (target, want_target))
    assert_close("keys", keys, want_keys, dtype)
    q, k = qkv.unflatten(-1, (-1, 64)).split([9, 6], dim=1)
    turned = apply_rotary(q, k, positions, cos_sin, wide=wide, backend="triton")
    expected = apply_rotary(q, k, positions, cos_sin, wide=wide, backend="torch")
    for name, mine, theirs in zip("qk", turned, expected, strict=True):
        assert_close(name, mine, theirs, dtype)


def test_unknown_backend_lists_the_known_ones() -> None:
    qkv, positions, cos_sin, slots, _ = make(DIMS[0], torch.float32)
    target = target_for(DIMS[0], torch.float32, slots)
    with pytest.raises(ValueError, match="torch, triton; got 'numpy'"):
        rotate_and_store(qkv, positions, cos_sin, target, backend="numpy")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [*DIMS, (12, 2, 128)])
def test_triton_matches_the_reference(
    dims: tuple[int, int, int], dtype: torch.dtype, norm: bool
) -> None:
    qkv, positions, cos_sin, slots, norms = make(dims, dtype, triton_device(), norm)
    want_target, target = target_for(dims, dtype, slots), target_for(dims, dtype, slots)
    want = rotate_and_store(qkv, positions, cos_sin, want_target, norms=norms, backend="torch")
    with poisoned_allocations():
        got = rotate_and_store(qkv, positions, cos_sin, target, norms=norms, backend="triton")
    assert_close("queries", got, want, dtype)
    assert torch.equal(target.k_pages_NGKD.isnan(), want_target.k_pages_NGKD.isnan())
    keys, want_keys = (t.k_pages_NGKD.nan_to_num(9.0) for t in (target, want_target))
    assert_close("keys", keys, want_keys, dtype)
    values, want_values = (t.v_pages_NGKD.nan_to_num(9.0) for t in (target, want_target))
    assert torch.equal(values, want_values)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(9, 3, 64), (12, 2, 128)])
def test_without_norms_triton_is_bit_equal_to_the_separate_kernels(
    dims: tuple[int, int, int], dtype: torch.dtype
) -> None:
    qkv, positions, cos_sin, slots, _ = make(dims, dtype, triton_device())
    want_target, target = target_for(dims, dtype, slots), target_for(dims, dtype, slots)
    want = separately(qkv, positions, cos_sin, want_target, None, dims, "triton")
    got = rotate_and_store(qkv, positions, cos_sin, target, backend="triton")
    assert torch.equal(got, want)
    keys, want_keys = (t.k_pages_NGKD.nan_to_num(9.0) for t in (target, want_target))
    assert torch.equal(keys, want_keys)


@pytest.mark.gpu
def test_a_token_gets_the_same_alone() -> None:
    dims = (9, 3, 64)
    qkv, positions, cos_sin, slots, norms = make(dims, torch.float16, triton_device(), True)
    target = target_for(dims, torch.float16, slots)
    full = rotate_and_store(qkv, positions, cos_sin, target, norms=norms, backend="triton")
    for token in (0, 2, 10):
        one = slice(token, token + 1)
        alone = KVTarget(target.k_pages_NGKD, target.v_pages_NGKD, slots[one])
        got = rotate_and_store(
            qkv[one], positions[one], cos_sin, alone, norms=norms, backend="triton"
        )
        assert torch.equal(got, full[one])
