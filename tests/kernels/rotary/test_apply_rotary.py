"""Rotary embedding against transformers' Llama, and Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.rotary import apply_rotary
from kernels.testing import assert_close, poisoned_allocations, triton_device

DIMS = [(1, 1, 16), (9, 3, 64), (4, 2, 80), (2, 2, 128)]


def table(max_position: int, head_dim: int) -> torch.Tensor:
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(max_position)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def make(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"):
    """q and k as slices of one fused projection, positions out of order."""
    fused = torch.randn(63, heads + 2 * kv_heads, head_dim).to(device, dtype)
    positions = torch.randperm(100)[:63].to(device)
    q, k = fused[:, :heads], fused[:, heads : heads + kv_heads]
    return q, k, positions, table(100, head_dim).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", DIMS)
def test_reference_equals_llama(dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, positions, cos_sin = make(*dims, dtype)
    cos, sin = (
        torch.cat((half, half), dim=-1).to(dtype) for half in cos_sin[positions].chunk(2, dim=-1)
    )
    want_q, want_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    )
    got_q, got_k = apply_rotary(q, k, positions, cos_sin, backend="torch")
    assert torch.equal(got_q, want_q[0].transpose(0, 1))
    assert torch.equal(got_k, want_k[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_reference_equals_olmo2(dtype: torch.dtype) -> None:
    from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb

    q, k, positions, cos_sin = make(*DIMS[1], dtype)
    cos, sin = (torch.cat((half, half), dim=-1) for half in cos_sin[positions].chunk(2, dim=-1))
    want_q, want_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    )
    got_q, got_k = apply_rotary(q, k, positions, cos_sin, wide=True, backend="torch")
    assert torch.equal(got_q, want_q[0].transpose(0, 1))
    assert torch.equal(got_k, want_k[0].transpose(0, 1))


def test_scores_depend_on_relative_position_only() -> None:
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float32)
    cos_sin = table(100, 64)

    def score(q_position: int, k_position: int) -> float:
        rotated, _ = apply_rotary(q, q, torch.tensor([q_position]), cos_sin, backend="torch")
        _, key = apply_rotary(k, k, torch.tensor([k_position]), cos_sin, backend="torch")
        return float((rotated * key).sum())

    assert score(7, 3) == pytest.approx(score(94, 90), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", DIMS)
def test_triton_matches_reference(dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    args = make(*dims, dtype, triton_device())
    want = apply_rotary(*args, backend="torch")
    with poisoned_allocations():
        got = apply_rotary(*args, backend="triton")
    assert_close("q", got[0], want[0], dtype)
    assert_close("k", got[1], want[1], dtype)
