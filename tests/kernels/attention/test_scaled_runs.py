"""Runs of rows of one sequence over fp8 pages: each row gets what it would get alone."""

from __future__ import annotations

import pytest
import torch

from kernels.testing import triton_device
from tests.helpers.scaled_pages import scaled

pytest.importorskip("triton")

from kernels.attention.decode import decode_attention
from tests.kernels.attention.test_runs import LONG, SMALL, Batch


def attend(batch: Batch, run: int, whole: bool | None) -> torch.Tensor:
    k, v, scales = scaled(batch.k, batch.v)
    out = torch.full_like(batch.q, float("nan"))
    rest = (batch.table, batch.query_start, batch.kv_len, batch.q.shape[-1] ** -0.5, out)
    options = {"whole": whole, "run": run, "scales": scales}
    decode_attention(batch.q, k, v, *rest, batch.slots, None, **options)
    return out[batch.live.to(out.device)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_runs_match_rows_alone(whole: bool, dtype: torch.dtype) -> None:
    batch = Batch([1, 16, 126, 200], [4, 1, 3, 4], 4, heads=(4, 2), head_dim=64, dtype=dtype)
    got = attend(batch, 4, whole)
    torch.testing.assert_close(got, attend(batch, 1, True), atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False])
def test_a_value_that_is_not_finite_reaches_whoever_of_a_run_sees_it(whole: bool) -> None:
    batch = Batch([40, 40], [4, 4], 4, heads=(4, 2), head_dim=64)
    clean = attend(batch, 4, whole)
    batch.v[int(batch.table[0, 2]), 41 % 16, 0, 3] = float("inf")
    got = attend(batch, 4, whole)
    assert torch.equal(got[:2], clean[:2]) and torch.equal(got[4:], clean[4:])
    assert got[2:4, :2].isnan().all() and torch.equal(got[2:4, 2:], clean[2:4, 2:])


@pytest.mark.gpu
@pytest.mark.skipif(triton_device() == "cpu", reason="needs the GPU's tensor cores")
@pytest.mark.parametrize("cases", [SMALL, LONG])
@pytest.mark.parametrize(("heads", "run"), [((12, 2), 4), ((32, 8), 2), ((28, 4), 4)])
@pytest.mark.parametrize("whole", [True, False])
def test_runs_have_the_bits_of_rows_alone(
    whole: bool, heads: tuple[int, int], run: int, cases: tuple
) -> None:
    valid = [min(run, used) for used in cases[1]]
    batch = Batch(cases[0], valid, run, heads, dtype=torch.bfloat16)
    got = attend(batch, run, whole)
    assert torch.equal(got, attend(batch, 1, True))
    assert torch.equal(got, attend(batch, 1, False))
