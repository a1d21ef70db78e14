"""Paged attention against torch's own attention on gathered rows, and Triton against that.

Unused page columns hold ids far out of range and unused KV is NaN: reading them shows.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from kernels.attention import paged_attention
from kernels.testing import assert_close, poison, poisoned_allocations, triton_device

ROWS = [(1, 1), (5, 5), (1, 30), (3, 17), (0, 0), (16, 16), (2, 70), (1, 16)]
"""(queries, KV length) of each row."""


class Case(NamedTuple):
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    table: torch.Tensor
    query_start: torch.Tensor
    kv_len: torch.Tensor

    def run(
        self, backend: str, max_query_len: int | None = None, window: int | None = None
    ) -> torch.Tensor:
        longest = int(self.query_start.diff().max()) if max_query_len is None else max_query_len
        scale = self.q.shape[-1] ** -0.5
        return paged_attention(
            *self, scale=scale, max_query_len=longest, window=window, backend=backend
        )


def make(
    rows: list[tuple[int, int]],
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    num_heads, num_kv_heads = heads
    columns = [-(-kv_len // page_size) for _, kv_len in rows]
    num_pages = sum(columns) + 2
    free = torch.randperm(num_pages).tolist()
    table = torch.full((len(rows), max(columns) + 1), 10**6, dtype=torch.int32)
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    k_pages, v_pages = poison(torch.empty(shape)), poison(torch.empty(shape))
    for row, (_, kv_len) in enumerate(rows):
        for position in range(kv_len):
            column, offset = divmod(position, page_size)
            if offset == 0:
                table[row, column] = free.pop()
            page = int(table[row, column])
            k_pages[page, offset], v_pages[page, offset] = torch.randn(2, *shape[2:])
    lengths = torch.tensor(rows, dtype=torch.int32)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), lengths[:, 0].cumsum(0).int()))
    q = torch.randn(int(starts[-1]), num_heads, head_dim)
    floats = [tensor.to(device, dtype) for tensor in (q, k_pages, v_pages)]
    return Case(*floats, *(t.to(device).contiguous() for t in (table, starts, lengths[:, 1])))


def with_sdpa(case: Case, window: int | None = None) -> torch.Tensor:
    """The same rows through torch's scaled_dot_product_attention in float32."""
    outputs = []
    group = case.q.shape[1] // case.k_pages.shape[2]
    starts = case.query_start.tolist()
    for row, kv_len in enumerate(case.kv_len.tolist()):
        q = case.q[starts[row] : starts[row + 1]].float().transpose(0, 1)
        if q.shape[1] == 0:
            continue
        pages = case.table[row, : -(-kv_len // case.k_pages.shape[1])].long()
        k, v = (
            pool[pages].flatten(0, 1)[:kv_len].float().transpose(0, 1).repeat_interleave(group, 0)
            for pool in (case.k_pages, case.v_pages)
        )
        last = kv_len - q.shape[1]
        mask = torch.ones(q.shape[1], kv_len, dtype=torch.bool).tril(last)
        if window is not None:
            mask = mask.triu(last - window + 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).to(case.q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 3), (4, 1)])
def test_reference_equals_sdpa(heads: tuple[int, int], dtype: torch.dtype) -> None:
    case = make(ROWS, heads, head_dim=20, dtype=dtype)
    assert_close("paged_attention", case.run("torch"), with_sdpa(case), dtype)


@pytest.mark.parametrize("window", [1, 4, 7, 16, 30, 100])
def test_reference_equals_sdpa_in_a_window(window: int) -> None:
    case = make(ROWS, head_dim=20)
    want = with_sdpa(case, window)
    hide_unseen(case, window)
    assert_close("paged_attention", case.run("torch", window=window), want, torch.float32)


def hide_unseen(case: Case, window: int) -> None:
    """Poison the KV that no query of a row sees."""
    page_size = case.k_pages.shape[1]
    lengths = zip(case.query_start.diff().tolist(), case.kv_len.tolist(), strict=True)
    for row, (queries, kv_len) in enumerate(lengths):
        for position in range(kv_len - queries - window + 1):
            page = int(case.table[row, position // page_size])
            for pages in (case.k_pages, case.v_pages):
                poison(pages[page, position % page_size])


def test_reference_is_causal() -> None:
    case = make([(3, 9)], page_size=3)
    before = case.run("torch")
    case.v_pages[case.table[0, 2].long(), 2] = 100.0
    after = case.run("torch")
    assert torch.equal(after[:2], before[:2])
    assert not torch.allclose(after[2], before[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
def test_triton_matches_reference(head_dim: int, dtype: torch.dtype) -> None:
    case = make(ROWS, head_dim=head_dim, dtype=dtype, device=triton_device())
    with poisoned_allocations():
        got = case.run("triton")
    assert_close("paged_attention", got, case.run("torch"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (14, 2), (20, 1)])
def test_triton_takes_any_group_and_page(heads: tuple[int, int], page_size: int) -> None:
    case = make(ROWS, heads, page_size=page_size, device=triton_device())
    with poisoned_allocations():
        got = case.run("triton")
    assert_close("paged_attention", got, case.run("torch"), torch.float32)


@pytest.mark.gpu
def test_triton_decode_over_many_splits() -> None:
    """Lengths about the split of 256, and beyond 16 of them."""
    rows = [(1, 1), (1, 255), (1, 256), (1, 257), (1, 700), (1, 4500)]
    if triton_device() == "cpu":
        rows = rows[1:5]
    case = make(rows, (4, 2), page_size=16, device=triton_device())
    with poisoned_allocations():
        got = case.run("triton")
    assert_close("paged_attention", got, case.run("torch"), torch.float32)


WINDOWED = [(1, 1), (5, 5), (1, 30), (3, 17), (0, 0), (16, 16), (2, 300), (1, 290), (150, 290)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 7, 16, 33, 128, 200, 1000])
def test_triton_matches_reference_in_a_window(window: int, dtype: torch.dtype) -> None:
    case = make(WINDOWED, head_dim=32, page_size=16, dtype=dtype, device=triton_device())
    hide_unseen(case, window)
    with poisoned_allocations():
        got = case.run("triton", window=window)
    assert_close("paged_attention", got, case.run("torch", window=window), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [80, 256])
def test_triton_matches_reference_in_a_window_of_wide_heads(head_dim: int) -> None:
    case = make(WINDOWED, head_dim=head_dim, page_size=16, device=triton_device())
    with poisoned_allocations():
        got = case.run("triton", window=40)
    assert_close("paged_attention", got, case.run("torch", window=40), torch.float32)


@pytest.mark.gpu
def test_triton_windows_over_many_splits() -> None:
    rows = [(1, 4500), (1, 1000), (1, 129), (1, 128), (1, 5)]
    if triton_device() == "cpu":
        rows = rows[1:]
    case = make(rows, (4, 2), page_size=16, device=triton_device())
    for window in (1, 129, 700, 4400):
        with poisoned_allocations():
            got = case.run("triton", window=window)
        want = case.run("torch", window=window)
        assert_close("paged_attention", got, want, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [5, 40, 150])
def test_triton_in_a_window_does_not_depend_on_batch_or_chunk(window: int) -> None:
    """The last queries of a row alone equal the same among all of it and beside other rows."""
    device = triton_device()
    whole = make([(200, 200), (1, 40)], device=device)
    together = whole.run("triton", window=window)
    for tail in (2, 37, 150):
        part = whole._replace(
            q=whole.q[200 - tail : 200],
            table=torch.nn.functional.pad(whole.table[:1], (0, 50)),
            query_start=torch.tensor([0, tail], dtype=torch.int32, device=device),
            kv_len=whole.kv_len[:1],
        )
        assert torch.equal(part.run("triton", window=window), together[200 - tail : 200])
    one = whole._replace(
        q=whole.q[200:],
        table=whole.table[1:],
        query_start=torch.tensor([0, 1], dtype=torch.int32, device=device),
        kv_len=whole.kv_len[1:],
    )
    assert torch.equal(one.run("triton", window=window), together[200:])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 100, 300])
def test_triton_in_a_window_gives_whole_rows_the_bits_of_splits(window: int) -> None:
    from kernels.attention.decode import decode_attention

    case = make([(1, 700), (1, 3), (1, 257)], (4, 2), page_size=16, device=triton_device())
    outs = []
    for whole in (False, True):
        out = torch.zeros_like(case.q)
        decode_attention(*case, 0.25, out, whole=whole, window=window)
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.gpu
def test_triton_gives_zeros_for_a_row_without_kv() -> None:
    case = make([(1, 5), (1, 0), (0, 0)], device=triton_device())
    with poisoned_allocations():
        got = case.run("triton")
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert not got[0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_result_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    device = triton_device()
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 dot")
    case = make([(1, 300), (7, 40), (3, 3), (1, 9)], dtype=dtype, device=device)
    together = case.run("triton")
    starts = case.query_start.tolist()
    for row in range(4):
        queries = slice(starts[row], starts[row + 1])
        length = starts[row + 1] - starts[row]
        alone = Case(
            case.q[queries],
            case.k_pages,
            case.v_pages,
            # A wider table too: capacity must not change how a row is split.
            torch.nn.functional.pad(case.table[row : row + 1], (0, 200)),
            torch.tensor([0, length], dtype=torch.int32, device=device),
            case.kv_len[row : row + 1],
        )
        assert torch.equal(alone.run("triton"), together[queries]), f"row {row}"


@pytest.mark.gpu
def test_triton_result_does_not_depend_on_the_chunk() -> None:
    """The last five of a row's queries alone equal the same five among all forty."""
    device = triton_device()
    whole = make([(40, 40)], device=device)
    tail = whole._replace(
        q=whole.q[35:], query_start=torch.tensor([0, 5], dtype=torch.int32, device=device)
    )
    assert torch.equal(tail.run("triton"), whole.run("triton")[35:])


def indirect(case: Case, max_kv_len: int | None, backend: str) -> torch.Tensor:
    """The same rows, their pages in a larger table at rows of another order."""
    rows = len(case.kv_len)
    order = torch.randperm(rows + 3)[:rows].to(case.table.device)
    table = case.table.new_full((rows + 3, case.table.shape[1]), 10**6)
    table[order] = case.table
    return paged_attention(
        *case._replace(table=table),
        scale=case.q.shape[-1] ** -0.5,
        max_query_len=int(case.query_start.diff().max()),
        table_rows_R=order.int(),
        max_kv_len=max_kv_len,
        backend=backend,
    )


def test_table_rows_of_the_reference() -> None:
    case = make(ROWS)
    assert torch.equal(indirect(case, None, "torch"), case.run("torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [ROWS, [(1, 1), (1, 700), (1, 2049), (1, 16)]])
def test_triton_with_table_rows_and_a_bound_is_bit_equal(rows: list[tuple[int, int]]) -> None:
    case = make(rows, page_size=16, device=triton_device())
    want = case.run("triton")
    for bound in (None, max(kv_len for _, kv_len in rows), 8192):
        with poisoned_allocations():
            assert torch.equal(indirect(case, bound, "triton"), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_triton_whole_rows_are_bit_equal_to_merged_splits(
    head_dim: int, dtype: torch.dtype
) -> None:
    from kernels.attention.decode import decode_attention

    rows = [(1, kv_len) for kv_len in (1, 64, 127, 128, 129, 700, 1024, 4097, 9000, 0)]
    rows[-1] = (0, 0)
    case = make(rows, (12, 2), head_dim, 16, dtype, triton_device())
    scale = head_dim**-0.5
    outs = [poison(torch.empty_like(case.q)) for _ in range(2)]
    for out, whole in zip(outs, (True, False), strict=True):
        decode_attention(*case, scale, out, whole=whole)
    assert torch.equal(*outs)
    assert_close("paged_attention", outs[0], case.run("torch"), dtype)
