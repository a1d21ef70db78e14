"""The comparison that every kernel test leans on can itself fail."""

from __future__ import annotations

import pytest
import torch

from kernels.testing import assert_close, poison, poisoned_allocations


def test_names_the_first_element_that_differs() -> None:
    want = torch.ones(3, 4)
    got = want.clone()
    got[1, 2] = 1.5
    got[2, 0] = 2.0
    with pytest.raises(AssertionError, match=r"op: 2 of 12 .*\(1, 2\): got 1.5, want 1"):
        assert_close("op", got, want, torch.float32)


def test_nan_never_equals_and_infinities_do() -> None:
    infinite = torch.tensor([float("inf"), float("-inf")])
    assert_close("op", infinite, infinite.clone(), torch.float32)
    with pytest.raises(AssertionError):
        assert_close("op", poison(torch.empty(2)), torch.zeros(2), torch.float32)
    with pytest.raises(AssertionError):
        assert_close("op", infinite, -infinite, torch.float32)


def test_integers_compare_exactly_and_shapes_and_dtypes_must_agree() -> None:
    ids = torch.tensor([1, 2])
    assert_close("op", ids, ids.clone(), torch.float32)
    for other in (ids + 1, ids.int(), ids[:1]):
        with pytest.raises(AssertionError, match="op"):
            assert_close("op", other, ids, torch.float32)


def test_poisoned_allocations_end_with_the_block() -> None:
    with poisoned_allocations():
        assert torch.empty(4).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert (torch.empty_like(torch.ones(2, dtype=torch.int32)) < 0).all()
    assert not torch.zeros(4).isnan().any()
    assert torch.empty.__name__ == "empty"
