"""A split back end over two torch ones against the reference, and which part takes which row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention.base import AttentionBatch
from engine.attention.split import SplitBackend
from engine.attention.torch_native import TorchNativeBackend
from engine.kv.pool import KVPool
from kernels.attention import paged_attention
from tests.helpers.head_pools import attend, head_pool

PAGE, HEADS, KV_HEADS, DIM = 4, 6, 2, 16
SCALE = DIM**-0.5

SHARED = [1, 2, 3]
CASES = {
    "mixed": ([[1, 2, 3], [4, 5, 7], [8], [9, 6]], [1, 6, 1, 2], [10, 11, 1, 5]),
    "decode rows read what a prefill row writes": (
        [[*SHARED, 10], [*SHARED, 11], [*SHARED, 12]],
        [14, 1, 1],
        [14, 13, 15],
    ),
    "a prefill row reads what a decode row writes": (
        [[*SHARED, 10], [*SHARED, 11]],
        [1, 3],
        [12, 15],
    ),
}


class Spy:
    """A back end that keeps the batches it was given."""

    def __init__(self, pool: KVPool) -> None:
        self.name = "spy"
        self.batches: list[AttentionBatch] = []
        self._inner = TorchNativeBackend(pool, num_heads=HEADS, scale=SCALE)

    def prepare(self, batch: AttentionBatch):
        self.batches.append(batch)
        return self._inner.prepare(batch)

    def capture_decode(self, layout: object) -> tuple[str, object]:
        return "captured", layout


def make_pool() -> KVPool:
    pool = head_pool(
        num_layers=2,
        num_pages=16,
        page_size=PAGE,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for pages in pool.tensors():
        pages.normal_()
    return pool


def make_batch(pages: list[list[int]], query_lens: list[int], kv_lens: list[int]) -> AttentionBatch:
    columns = max(len(p) for p in pages)
    table = np.array([p + [0] * (columns - len(p)) for p in pages], dtype=np.int32)
    write_slots = [
        pages[row][position // PAGE] * PAGE + position % PAGE
        for row, (n, kv) in enumerate(zip(query_lens, kv_lens, strict=True))
        for position in range(kv - n, kv)
    ]
    return AttentionBatch(
        query_start_R1=np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int64),
        kv_lens_R=np.array(kv_lens, dtype=np.int64),
        slots_R=np.arange(len(pages), dtype=np.int64),
        host_pages=table,
        page_table=torch.from_numpy(table),
        write_slots_T=torch.tensor(write_slots),
        page_size=PAGE,
        device=torch.device("cpu"),
    )


def make_split(pool: KVPool) -> tuple[SplitBackend, Spy, Spy]:
    prefill, decode = Spy(pool), Spy(pool)
    return SplitBackend(pool, prefill=prefill, decode=decode), prefill, decode


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str) -> None:
    torch.manual_seed(0)
    batch, pool = make_batch(*CASES[case]), make_pool()
    split, prefill, decode = make_split(pool)
    num_tokens = int(batch.query_start_R1[-1])
    q = torch.randn(num_tokens, HEADS, DIM)
    k, v = torch.randn(2, num_tokens, KV_HEADS, DIM).unbind(0)
    got = attend(split.prepare(batch), 1, q, k, v)
    want = paged_attention(
        q,
        *pool.layer(1),
        batch.page_table,
        torch.from_numpy(batch.query_start_R1.astype(np.int32)),
        torch.from_numpy(batch.kv_lens_R.astype(np.int32)),
        scale=SCALE,
        max_query_len=int(batch.query_lens_R.max()),
        backend="torch",
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert (decode.batches[0].query_lens_R == 1).all()
    assert (prefill.batches[0].query_lens_R > 1).all()
    assert len(decode.batches[0].slots_R) + len(prefill.batches[0].slots_R) == len(batch.slots_R)


@pytest.mark.parametrize(
    ("query_lens", "to_prefill", "to_decode"), [([1, 1], 0, 1), ([3, 2], 1, 0), ([1, 4], 1, 1)]
)
def test_a_step_of_one_kind_stays_whole(
    query_lens: list[int], to_prefill: int, to_decode: int
) -> None:
    split, prefill, decode = make_split(make_pool())
    split.prepare(make_batch([[1], [2]], query_lens, query_lens))
    assert (len(prefill.batches), len(decode.batches)) == (to_prefill, to_decode)


def test_graphs_are_of_the_decode_back_end() -> None:
    split, _, _ = make_split(make_pool())
    assert split.capture_decode("layout") == ("captured", "layout")
    assert split.name == "spy+spy"
