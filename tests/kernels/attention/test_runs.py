"""Runs of rows of one sequence: each row gets what it would get alone, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import paged_attention
from kernels.testing import triton_device

pytest.importorskip("triton")

from kernels.attention.call import decode_call
from kernels.attention.decode import decode_attention
from kernels.attention.runs import takes_runs

PAGE = 16


class Batch:
    """Runs of `run` rows: sequence i has lengths[i] tokens in its first row, and `valid[i]` rows in
    use, the others on the last row of the table."""

    def __init__(
        self,
        lengths: list[int],
        valid: list[int],
        run: int,
        heads: tuple[int, int] = (12, 2),
        head_dim: int = 128,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        device, generator = triton_device(), torch.Generator().manual_seed(run)
        pages = [-(-(length + run) // PAGE) for length in lengths]
        num_pages, columns = sum(pages) + 1, max(pages)
        order = (torch.randperm(num_pages - 1, generator=generator) + 1).int()
        table = torch.zeros(len(lengths) + 1, columns, dtype=torch.int32)
        for slot, part in enumerate(order.split(pages)):
            table[slot, : len(part)] = part
        rows = [
            (slot, length + j) if j < used else (len(lengths), 1)
            for slot, (length, used) in enumerate(zip(lengths, valid, strict=True))
            for j in range(run)
        ]
        self.run = run
        self.live = torch.tensor([slot < len(lengths) for slot, _ in rows])
        self.table = table.to(device)
        self.slots = torch.tensor([slot for slot, _ in rows], dtype=torch.int32, device=device)
        self.kv_len = torch.tensor([size for _, size in rows], dtype=torch.int32, device=device)
        self.query_start = torch.arange(len(rows) + 1, dtype=torch.int32, device=device)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        self.q = values(len(rows), heads[0], head_dim)
        self.k = values(num_pages, PAGE, heads[1], head_dim)
        self.v = values(num_pages, PAGE, heads[1], head_dim)

    def attend(self, *, run: int, whole: bool | None = None) -> torch.Tensor:
        out = torch.full_like(self.q, float("nan"))
        decode_attention(
            self.q,
            self.k,
            self.v,
            self.table,
            self.query_start,
            self.kv_len,
            self.q.shape[-1] ** -0.5,
            out,
            self.slots,
            None,
            whole=whole,
            run=run,
        )
        return out[self.live.to(out.device)]

    def reference(self) -> torch.Tensor:
        out = paged_attention(
            self.q.float(),
            self.k.float(),
            self.v.float(),
            self.table,
            self.query_start,
            self.kv_len,
            scale=self.q.shape[-1] ** -0.5,
            max_query_len=1,
            table_rows_R=self.slots,
            backend="torch",
        )
        return out[self.live.to(out.device)]


SMALL = ([1, 15, 16, 125, 126, 128, 200, 256], [4, 4, 1, 4, 3, 2, 4, 4])
LONG = ([4093, 4094, 4096, 4097, 8190, 300, 5000], [4, 4, 4, 2, 4, 1, 3])


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False])
def test_runs_are_close_to_the_reference(whole: bool) -> None:
    batch = Batch(*SMALL, run=4, heads=(4, 2), head_dim=64)
    got = batch.attend(run=4, whole=whole)
    torch.testing.assert_close(got.float(), batch.reference(), atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(triton_device() == "cpu", reason="needs the GPU's tensor cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cases", [SMALL, LONG])
@pytest.mark.parametrize(("heads", "run"), [((12, 2), 4), ((32, 8), 2), ((12, 2), 8), ((28, 4), 4)])
@pytest.mark.parametrize("whole", [True, False])
def test_runs_have_the_bits_of_rows_alone(
    whole: bool, heads: tuple[int, int], run: int, cases: tuple, dtype: torch.dtype
) -> None:
    valid = [min(run, used) for used in cases[1]]
    batch = Batch(cases[0], valid, run, heads, dtype=dtype)
    got = batch.attend(run=run, whole=whole)
    assert torch.equal(got, batch.attend(run=1, whole=True))
    assert torch.equal(got, batch.attend(run=1, whole=False))


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_reaches_whoever_sees_it(value: float, whole: bool) -> None:
    batch = Batch([40, 40], [4, 4], run=4, heads=(4, 2), head_dim=64)
    clean = batch.attend(run=4, whole=whole)
    position = 41
    page = int(batch.table[0, position // PAGE])
    batch.v[page, position % PAGE, 0, 3] = value
    got = batch.attend(run=4, whole=whole)
    # Rows 0 and 1 of the first sequence end before that position; kv head 0 serves heads 0, 1.
    assert torch.equal(got[:2], clean[:2]) and torch.equal(got[4:], clean[4:])
    assert not torch.isfinite(got[2:4, :2]).all(dim=-1).any()
    assert torch.equal(got[2:4, 2:], clean[2:4, 2:])


def test_what_no_tile_holds_is_read_row_by_row() -> None:
    """The rule: 16-bit elements, 64 query rows at most, no window."""
    q = torch.zeros(8, 12, 128, dtype=torch.bfloat16)
    pages = torch.zeros(2, PAGE, 2, 128, dtype=torch.bfloat16)
    ints = torch.zeros(9, dtype=torch.int32)
    table = torch.zeros(8, 1, dtype=torch.int32)

    def call(q: torch.Tensor, k: torch.Tensor):
        return decode_call(q, k, k, table, ints, ints[:8], 1.0, q, ints[:8], None)

    assert takes_runs(call(q, pages), 4, None) and takes_runs(call(q, pages), 8, None)
    assert not takes_runs(call(q, pages), 1, None)
    assert not takes_runs(call(q, pages), 16, None)
    assert not takes_runs(call(q, pages), 4, 128)
    assert not takes_runs(call(q.float(), pages.float()), 4, None)
