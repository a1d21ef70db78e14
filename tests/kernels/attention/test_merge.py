"""Merging partial attention states equals attention over all keys at once."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import merge_states
from kernels.testing import assert_close, poison


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("thd,shd->ths", q.double(), k.double())
    out = torch.einsum("ths,shd->thd", scores.softmax(-1), v.double())
    return out.to(q.dtype), scores.logsumexp(-1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_make_the_whole(dtype: torch.dtype) -> None:
    q = torch.randn(5, 3, 16)
    k, v = torch.randn(2, 63, 3, 16)
    want_out, want_lse = attend(q, k, v)
    out_a, lse_a = attend(q, k[:20], v[:20])
    out_b, lse_b = attend(q, k[20:], v[20:])
    out, lse = merge_states(out_a.to(dtype), lse_a, out_b.to(dtype), lse_b)
    assert out.dtype == dtype
    assert_close("out", out, want_out.to(dtype), dtype)
    assert_close("lse", lse, want_lse, torch.float32)


def test_an_empty_part_changes_nothing_even_if_poisoned() -> None:
    out_a, lse_a = torch.randn(5, 3, 16), torch.randn(5, 3)
    nothing, empty = poison(torch.empty(5, 3, 16)), torch.full((5, 3), float("-inf"))
    for parts in ((out_a, lse_a, nothing, empty), (nothing, empty, out_a, lse_a)):
        out, lse = merge_states(*parts)
        assert torch.equal(out, out_a) and torch.equal(lse, lse_a)


def test_two_empty_parts_give_zeros() -> None:
    nothing, empty = poison(torch.empty(5, 3, 16)), torch.full((5, 3), float("-inf"))
    out, lse = merge_states(nothing, empty, nothing, empty)
    assert torch.equal(out, torch.zeros(5, 3, 16)) and torch.equal(lse, empty)
