"""torch_native over fp8 pages against the reference; a token's bytes whatever it comes with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention.torch_native import TorchNativeBackend
from engine.kv.layout import head_pages
from engine.kv.pool import KVPool
from kernels.attention import paged_attention
from kernels.quant.fp8_kv import as_bytes
from tests.engine.attention.test_torch_native import CASES, make_batch
from tests.helpers.head_pools import attend, head_pool

PAGE, HEADS, KV_HEADS, DIM = 4, 6, 2, 16
SCALE = DIM**-0.5


def make_pool(window: int | None = None, dtype: torch.dtype = torch.float32) -> KVPool:
    """Every page written."""
    pool = head_pool(
        num_layers=2,
        num_pages=64,
        page_size=PAGE,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        windows=(None, window),
        scaled=True,
    )
    pages = list(range(64))
    for layer in range(2):
        fill(pool, layer, pages, *torch.randn(2, 256, KV_HEADS, DIM).to(dtype).unbind(0))
    return pool


def step(pool: KVPool, pages: list[list[int]], query_lens: list[int], kv_lens: list[int]):
    backend = TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE)
    return backend.prepare(make_batch(pages, query_lens, kv_lens))


def fill(pool: KVPool, layer: int, pages: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
    """Write all positions of some pages."""
    q = torch.zeros(len(k), HEADS, DIM, dtype=k.dtype)
    attend(step(pool, [pages], [len(k)], [len(k)]), layer, q, k, v)


def reference(pool: KVPool, batch, q: torch.Tensor, window: int | None = None) -> torch.Tensor:
    k_pages, v_pages, scales = head_pages(pool.layer(1))
    return paged_attention(
        q,
        k_pages,
        v_pages,
        batch.page_table,
        torch.from_numpy(batch.query_start_R1.astype(np.int32)),
        torch.from_numpy(batch.kv_lens_R.astype(np.int32)),
        scale=SCALE,
        max_query_len=int(batch.query_lens_R.max()),
        window=window,
        scales=scales,
        backend="torch",
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(
    case: str, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    batch, pool = make_batch(*CASES[case]), make_pool(window, dtype)
    tokens = int(batch.query_start_R1[-1])
    q = torch.randn(tokens, HEADS, DIM).to(dtype)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM).to(dtype).unbind(0)
    got = attend(step(pool, *CASES[case]), 1, q, k, v)
    torch.testing.assert_close(got, reference(pool, batch, q, window), atol=tolerance, rtol=0.02)


def stored(pool: KVPool, places: list[int]) -> list[torch.Tensor]:
    """Bytes and scales that layer 1 keeps of some places."""
    k, v, scales = head_pages(pool.layer(1))
    assert scales is not None
    pages, offsets = np.divmod(places, PAGE)
    codes = [as_bytes(x)[pages, offsets] for x in (k, v)]
    return [*codes, *(x.transpose(1, 2)[pages, offsets] for x in scales)]


def test_a_token_keeps_the_same_bytes_alone_in_a_batch_and_in_chunks() -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(14, HEADS, DIM), torch.randn(2, 14, KV_HEADS, DIM)
    k[3] *= 1e3
    first, other = [1, 2, 3], [4]
    kept, outputs = [], []
    for parts in ([10], [4, 6], [1] * 10):
        pool, done, outs = make_pool(), 0, []
        for size in parts:
            rows = slice(done, done + size)
            done += size
            row = step(pool, [first], [size], [done])
            outs.append(attend(row, 1, q[rows], k[rows], v[rows]))
        kept.append(stored(pool, [4 + i for i in range(10)]))
        outputs.append(torch.cat(outs))
    pool = make_pool()
    both = step(pool, [other, first], [4, 10], [4, 10])
    order = [10, 11, 12, 13, *range(10)]
    outputs.append(attend(both, 1, q[order], k[order], v[order])[4:])
    kept.append(stored(pool, [4 + i for i in range(10)]))
    for parts in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parts, kept[0], strict=True))
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], atol=2e-5, rtol=2e-5)


def test_pages_are_copied_with_their_scales() -> None:
    k, v = torch.randn(2, 8, KV_HEADS, DIM)
    copied, written = make_pool(), make_pool()
    fill(copied, 1, [3, 9], k, v)
    copied.copy(torch.tensor([3, 9]), torch.tensor([9, 20]))
    fill(written, 1, [9, 20], k, v)
    for page in (9, 20):
        places = [page * PAGE + offset for offset in range(PAGE)]
        pairs = zip(stored(copied, places), stored(written, places), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_zeros_stand_in_for_what_is_not_finite_and_are_marked() -> None:
    pool = make_pool()
    q, (k, v) = torch.randn(4, HEADS, DIM), torch.randn(2, 4, KV_HEADS, DIM)
    k[2, 1, 5] = float("nan")
    row = step(pool, [[1]], [4], [4])
    assert attend(row, 1, q, k, v).isfinite().all()
    assert row.spoilt_rows().tolist() == [True]
    assert all(part.float().isfinite().all() for part in stored(pool, [4, 5, 6, 7]))
