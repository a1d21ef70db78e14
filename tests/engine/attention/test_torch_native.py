"""The torch back end against the one-row-at-a-time reference of `kernels.attention`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention import sharing
from engine.attention.base import AttentionBatch
from engine.attention.torch_native import TorchNativeBackend
from engine.kv.pool import KVPool
from kernels.attention import paged_attention
from tests.helpers.head_pools import attend, head_pool

PAGE, HEADS, KV_HEADS, DIM = 4, 6, 2, 16
SCALE = DIM**-0.5


def make_pool(
    dtype: torch.dtype = torch.float32,
    num_pages: int = 64,
    windows: tuple[int | None, int | None] | None = None,
) -> KVPool:
    pool = head_pool(
        num_layers=2,
        num_pages=num_pages,
        page_size=PAGE,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        windows=windows,
    )
    for pages in pool.tensors():
        pages.normal_()
    return pool


def make_batch(pages: list[list[int]], query_lens: list[int], kv_lens: list[int]) -> AttentionBatch:
    columns = max(len(p) for p in pages)
    table = np.array([p + [0] * (columns - len(p)) for p in pages], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int64)
    slots = [
        pages[row][position // PAGE] * PAGE + position % PAGE
        for row, (n, kv) in enumerate(zip(query_lens, kv_lens, strict=True))
        for position in range(kv - n, kv)
    ]
    return AttentionBatch(
        query_start_R1=starts,
        kv_lens_R=np.array(kv_lens, dtype=np.int64),
        slots_R=np.arange(len(pages), dtype=np.int64),
        host_pages=table,
        page_table=torch.from_numpy(table),
        write_slots_T=torch.tensor(slots),
        page_size=PAGE,
        device=torch.device("cpu"),
    )


def compare(
    batch: AttentionBatch, pool: KVPool, *, tolerance: float, window: int | None = None
) -> None:
    """Layer 1, whose window is `window`."""
    num_tokens = int(batch.query_start_R1[-1])
    dtype = pool.layer(1)[0].dtype
    q = torch.randn(num_tokens, HEADS, DIM).to(dtype)
    k = torch.randn(num_tokens, KV_HEADS, DIM).to(dtype)
    v = torch.randn(num_tokens, KV_HEADS, DIM).to(dtype)
    backend = TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE)
    got = attend(backend.prepare(batch), 1, q, k, v)
    want = paged_attention(
        q,
        *pool.layer(1),
        batch.page_table,
        torch.from_numpy(batch.query_start_R1.astype(np.int32)),
        torch.from_numpy(batch.kv_lens_R.astype(np.int32)),
        scale=SCALE,
        max_query_len=int(batch.query_lens_R.max()),
        window=window,
        backend="torch",
    )
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    written = pool.layer(1)[0].view(-1, KV_HEADS, DIM)[batch.write_slots_T]
    assert torch.equal(written, k)


SHARED = [1, 2, 3, 4, 5, 6]
CASES = {
    "decode": ([[1, 2], [3], [4, 5, 6]], [1, 1, 1], [7, 3, 9]),
    "prefill": ([[1, 2, 3], [4, 5]], [9, 5], [9, 5]),
    "prefill with a cached prefix": ([[1, 2, 3], [4, 5]], [3, 2], [11, 8]),
    "mixed": ([[1, 2, 3], [4, 5, 7], [8]], [1, 6, 1], [10, 11, 1]),
    "group decode": ([[*SHARED, 10 + i] for i in range(5)], [1] * 5, [25, 26, 27, 28, 25]),
    "group decode beside others": (
        [[20, 21], *[[*SHARED, 10 + i] for i in range(5)], [22]],
        [1] * 7,
        [8, 25, 26, 27, 28, 25, 2],
    ),
    "group prefill of own tails": (
        [[*SHARED, 10 + i, 20 + i] for i in range(5)],
        [3, 1, 5, 2, 1],
        [27, 26, 30, 27, 25],
    ),
    "leader writes the pages its group reads": (
        [[*SHARED, 10 + i] for i in range(5)],
        [26, 1, 1, 1, 2],
        [26, 25, 25, 25, 26],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compare(make_batch(*CASES[case]), make_pool(), tolerance=2e-5)


@pytest.mark.parametrize("window", [1, 3, 4, 9, 26, 100])
@pytest.mark.parametrize("case", CASES)
def test_a_window_equals_the_reference(case: str, window: int) -> None:
    torch.manual_seed(0)
    pool = make_pool(windows=(None, window))
    compare(make_batch(*CASES[case]), pool, tolerance=2e-5, window=window)


@pytest.mark.parametrize("window", [1, 60, 700])
def test_a_window_in_rows_of_many_blocks(window: int) -> None:
    """Queries of one chunk that see nothing of its first blocks, and a row beside them."""
    torch.manual_seed(0)
    pages = torch.randperm(600).tolist()
    pool = make_pool(num_pages=600, windows=(None, window))
    batch = make_batch([pages[:375], pages[375:500]], [1100, 3], [1500, 500])
    compare(batch, pool, tolerance=2e-5, window=window)


def test_each_layer_has_its_own_window() -> None:
    torch.manual_seed(0)
    batch, pool = make_batch(*CASES["group decode"]), make_pool(windows=(None, 5))
    q = torch.randn(5, HEADS, DIM)
    k, v = torch.randn(2, 5, KV_HEADS, DIM).unbind(0)
    for layer in (0, 1):
        for pages in pool.layer(layer):
            pages.copy_(pool.layer(0)[0])
    backend = TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE)
    step = backend.prepare(batch)
    assert step.layout(0).runs and not step.layout(1).runs
    assert not torch.allclose(attend(step, 0, q, k, v), attend(step, 1, q, k, v))


@pytest.mark.parametrize("case", ["group decode", "mixed"])
def test_bfloat16(case: str) -> None:
    torch.manual_seed(0)
    compare(make_batch(*CASES[case]), make_pool(torch.bfloat16), tolerance=3e-2)


def test_the_group_case_does_share() -> None:
    """Else the cases above would not test the merge."""
    batch = make_batch(*CASES["group decode"])
    step = TorchNativeBackend(make_pool(), num_heads=HEADS, scale=SCALE).prepare(batch)
    assert len(step.layout(0).runs) == 1
    assert 4 * len(SHARED) >= sharing.MIN_PAGES_SAVED


def test_sharing_changes_nothing_beyond_rounding() -> None:
    torch.manual_seed(0)
    batch, pool = make_batch(*CASES["group decode"]), make_pool()
    q = torch.randn(5, HEADS, DIM)
    k, v = torch.randn(2, 5, KV_HEADS, DIM).unbind(0)
    shared, apart = (
        attend(
            TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE, share_prefixes=share).prepare(
                batch
            ),
            0,
            q,
            k,
            v,
        )
        for share in (True, False)
    )
    torch.testing.assert_close(shared, apart, atol=1e-6, rtol=1e-5)


def test_a_row_of_nan_does_not_reach_the_next_tenant_of_its_page() -> None:
    """The next row's last page keeps a stale tail, which only the mask hides."""
    pool = make_pool()
    for pages in pool.tensors():
        pages.zero_()
    backend = TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE)
    bad = torch.full((4, HEADS, DIM), float("nan"))
    bad_kv = torch.full((4, KV_HEADS, DIM), float("inf"))
    step = backend.prepare(make_batch([[1]], [4], [4]))
    assert attend(step, 0, bad, bad_kv, bad_kv).isnan().all()
    good = backend.prepare(make_batch([[1]], [1], [1]))
    q, kv = torch.randn(1, HEADS, DIM), torch.randn(1, KV_HEADS, DIM)
    assert attend(good, 0, q, kv, kv).isfinite().all()


def test_a_step_says_what_it_writes_only_while_something_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool()
    backend = TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE)
    told: list[list[int]] = []
    monkeypatch.setattr(pool.spoilt, "written", lambda pages, _: told.append(pages.tolist()))
    backend.prepare(make_batch([[1]], [2], [2]))
    assert told == []
    pool.spoilt.mark(np.array([1]), np.array([0]))
    backend.prepare(make_batch([[1]], [2], [2]))
    assert told == [[1, 1]]
