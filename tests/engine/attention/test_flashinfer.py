"""FlashInfer: its tables against a loop, and on a GPU its attention against the reference."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from engine.attention.base import AttentionBatch, DecodeLayout
from engine.attention.flashinfer import FlashInferBackend, paged_rows, workspace_bytes
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from kernels.attention import reference
from kernels.testing import assert_close, poison, poisoned_allocations
from rollout.launch import launch
from tests.helpers.engines import drain, exact_logprobs, request
from tests.helpers.head_pools import attend, head_pool
from tests.helpers.tiny_models import write_tiny

PAGE = 16

on_gpu = pytest.mark.gpu
needs_flashinfer = pytest.mark.skipif(
    find_spec("flashinfer") is None, reason="FlashInfer is not installed"
)


def by_a_loop(pages, slots, kv_lens, page_size) -> tuple[list, list, list]:
    indptr, indices, last = [0], [], []
    for slot, kv_len in zip(slots, kv_lens, strict=True):
        count = (kv_len + page_size - 1) // page_size
        indices += [pages[slot][column] for column in range(count)]
        indptr.append(len(indices))
        last.append(kv_len % page_size or page_size)
    return indptr, indices, last


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("equal", [True, False])
def test_paged_rows_equal_a_loop(rows: int, page_size: int, equal: bool) -> None:
    rng = np.random.default_rng(rows)
    columns = 9
    pages = rng.integers(0, 1000, (50, columns), dtype=np.int32)
    slots = rng.permutation(50)[:rows].astype(np.int32)
    lens = rng.integers(1, columns * page_size + 1, rows).astype(np.int32)
    if equal:
        lens[:] = columns * page_size
    got = paged_rows(pages, slots, lens, page_size)
    want = by_a_loop(pages.tolist(), slots.tolist(), lens.tolist(), page_size)
    for array, expected in zip((got.indptr_R1, got.indices_U, got.last_R), want, strict=True):
        assert array.dtype == np.int32
        assert array.tolist() == expected


def test_the_workspace_holds_what_a_plan_may_cut() -> None:
    """FlashInfer reserves H * items * tile * (D + 1) floats; items as its scheduler counts."""
    for heads, kv_heads, rows, tile in ((12, 2, 1024, 16), (32, 8, 7, 16), (32, 1, 64, 64)):
        got = workspace_bytes(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=128, max_rows=rows, num_sms=132
        )
        group = heads // kv_heads
        captured = max(264 // kv_heads, -(-rows * group // tile) + rows - 1) * tile
        eager = 264 // kv_heads * 128
        assert got >= 4 * 129 * heads * max(captured, eager)


class Rows:
    """Random rows over a pool whose other pages and tails are poisoned."""

    def __init__(
        self,
        lens: list[tuple[int, int]],
        *,
        heads: tuple[int, int],
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        share: int = 0,
        tail: float = 1e4,
    ) -> None:
        """lens: (queries, KV length) of each row. share: leading pages all rows have in
        common. tail: what their last pages hold behind them."""
        self.device = torch.device("cuda")
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        query_lens, kv_lens = np.array(lens).T
        columns = max(-(-int(kv_lens.max()) // PAGE), share)
        free = np.random.default_rng(0).permutation(len(lens) * columns + 2).astype(np.int32)
        self.table = free[: len(lens) * columns].reshape(len(lens), columns).copy()
        self.table[:, :share] = self.table[0, :share]
        self.pool = head_pool(
            num_layers=2,
            num_pages=len(free),
            page_size=PAGE,
            num_kv_heads=heads[1],
            head_dim=head_dim,
            dtype=dtype,
            device=self.device,
        )
        self.set_lens(query_lens, kv_lens)
        self._fill(tail)

    def set_lens(self, query_lens: np.ndarray, kv_lens: np.ndarray) -> None:
        self.query_lens, self.kv_lens = query_lens.astype(np.int64), kv_lens.astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.query_lens)])

    def _fill(self, tail: float) -> None:
        """NaN in pages of nobody, `tail` behind the rows in their own."""
        owned = torch.from_numpy(np.unique(self.table)).long().to(self.device)
        for pages in self.pool.tensors():
            poison(pages)
            pages[:, owned] = tail
            for row, kv_len in enumerate(self.kv_lens):
                used = torch.from_numpy(self.table[row, : -(-kv_len // PAGE)]).long()
                full = pages[:, used.to(self.device)].flatten(1, 2)
                full[:, :kv_len] = torch.randn_like(full[:, :kv_len])
                pages[:, used.to(self.device)] = full.unflatten(1, (-1, PAGE))

    def write_slots(self) -> torch.Tensor:
        row = np.repeat(np.arange(len(self.kv_lens)), self.query_lens)
        first = np.repeat(self.kv_lens - self.query_lens - self.starts[:-1], self.query_lens)
        position = first + np.arange(self.starts[-1])
        slots = self.table[row, position // PAGE].astype(np.int64) * PAGE + position % PAGE
        return torch.from_numpy(slots).to(self.device)

    def batch(self) -> AttentionBatch:
        return AttentionBatch(
            query_start_R1=self.starts,
            kv_lens_R=self.kv_lens,
            slots_R=np.arange(len(self.kv_lens)),
            host_pages=self.table,
            page_table=torch.from_numpy(self.table).to(self.device),
            write_slots_T=self.write_slots(),
            page_size=PAGE,
            device=self.device,
        )

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries as a slice of a wider product, as a layer hands them over."""
        (heads, kv_heads), tokens = self.heads, int(self.starts[-1])
        wide = torch.randn(
            tokens, heads + 2 * kv_heads, self.head_dim, device=self.device, dtype=self.dtype
        )
        q, k, v = wide.split([heads, kv_heads, kv_heads], dim=1)
        return q, k.contiguous(), v.contiguous()

    def want(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """In float32, over what the pool holds by now."""
        k_pages, v_pages = (pages.float() for pages in self.pool.layer(layer))
        return reference.paged_attention(
            q.float(),
            k_pages,
            v_pages,
            torch.from_numpy(self.table),
            torch.from_numpy(self.starts),
            torch.from_numpy(self.kv_lens),
            self.scale,
        ).to(self.dtype)

    @property
    def scale(self) -> float:
        return 1.5 * self.head_dim**-0.5

    def backend(self, **options) -> FlashInferBackend:
        return FlashInferBackend(self.pool, num_heads=self.heads[0], scale=self.scale, **options)


CASES = {
    "decode": [(1, 1), (1, 16), (1, 17), (1, 100), (1, 333)],
    "prefill": [(63, 63), (100, 100), (1, 1), (17, 17)],
    "prefill behind a prefix": [(63, 80), (5, 700), (128, 129)],
    "mixed": [(1, 40), (70, 70), (1, 1), (33, 100), (2, 50)],
}


@on_gpu
@needs_flashinfer
@pytest.mark.parametrize("kernels", ["fa2", "auto"])
@pytest.mark.parametrize("heads", [(12, 2), (32, 8), (4, 4)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tail", [1e4, float("nan")])
def test_steps_equal_the_reference(
    case: str, heads: tuple[int, int], kernels: str, tail: float
) -> None:
    """Whatever a page's tenant before left behind a row, NaN as well."""
    torch.manual_seed(0)
    rows = Rows(CASES[case], heads=heads, tail=tail)
    backend = rows.backend(long_kernels=kernels, long_queries=0)
    q, k, v = rows.qkv()
    step = backend.prepare(rows.batch())
    with poisoned_allocations():
        got = [attend(step, layer, q, k, v) for layer in range(2)]
    for layer, out in enumerate(got):
        assert_close(f"{case}, layer {layer}", out, rows.want(layer, q), rows.dtype)


@on_gpu
@needs_flashinfer
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 128), (torch.bfloat16, 64)])
def test_other_shapes(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    rows = Rows(CASES["mixed"], heads=(14, 2), head_dim=dim, dtype=dtype)
    q, k, v = rows.qkv()
    got = attend(rows.backend(long_kernels="fa2").prepare(rows.batch()), 0, q, k, v)
    assert_close("other shapes", got, rows.want(0, q), dtype)


@on_gpu
@needs_flashinfer
def test_plans_queued_ahead_do_not_overwrite_each_other() -> None:
    """The host is steps ahead of the GPU: each must still run by its own plan."""
    torch.manual_seed(0)
    rows = Rows([(100, 100)] * 4, heads=(12, 2))
    backend = rows.backend()
    steps = []
    for count in (4, 1, 3, 2):
        rows.set_lens(np.array([25 * count] * count), np.array([100] * count))
        steps.append((rows.batch(), *rows.qkv()))
    attend(backend.prepare(steps[0][0]), 1, *steps[0][1:])
    wants = []
    for batch, q, k, v in steps:
        attend(backend.prepare(batch), 0, q, k, v)
        rows.query_lens, rows.kv_lens = batch.query_lens_R, batch.kv_lens_R
        rows.starts = batch.query_start_R1
        wants.append(rows.want(0, q))
    torch.cuda._sleep(500_000_000)
    outs = [attend(backend.prepare(batch), 0, q, k, v) for batch, q, k, v in steps]
    for out, want in zip(outs, wants, strict=True):
        assert_close("queued ahead", out, want, rows.dtype)


@on_gpu
@needs_flashinfer
def test_a_graph_serves_rows_that_change() -> None:
    torch.manual_seed(0)
    bucket, scratch = 8, 6
    rows = Rows([(1, 333)] * scratch + [(1, 1)], heads=(12, 2), share=4)
    table = torch.from_numpy(rows.table).cuda()
    inputs = torch.zeros(2, bucket, dtype=torch.int32, device="cuda")
    write_slots = torch.zeros(bucket, dtype=torch.int64, device="cuda")
    layout = DecodeLayout(
        rows=bucket,
        slots_R=inputs[0],
        kv_lens_R=inputs[1],
        write_slots_R=write_slots,
        query_start_R1=torch.arange(bucket + 1, dtype=torch.int32, device="cuda"),
        page_table=table,
        host_pages=rows.table,
        max_kv_len=333,
        page_size=PAGE,
    )
    captured = rows.backend().capture_decode(layout)
    q = torch.randn(bucket, 12, 128, device="cuda", dtype=rows.dtype)
    k, v = torch.randn(2, bucket, 2, 128, device="cuda", dtype=rows.dtype).unbind(0)

    def fill(slots: list[int], kv_lens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        slots_R = np.array(slots + [scratch] * (bucket - len(slots)), np.int32)
        lens_R = np.array(kv_lens + [1] * (bucket - len(slots)), np.int32)
        at = torch.from_numpy(rows.table[slots_R, (lens_R - 1) // PAGE].astype(np.int64))
        write_slots.copy_(at * PAGE + torch.from_numpy((lens_R - 1).astype(np.int64)) % PAGE)
        captured.refresh(slots_R, lens_R)
        return slots_R, lens_R

    fill([], [])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        attend(captured.step, 0, q, k, v)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = attend(captured.step, 0, q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    for slots, lens in (
        ([0, 1, 2, 3, 4, 5], [333] * 6),
        ([5, 2], [64, 1]),
        ([3], [257]),
        ([1, 0, 4], [332, 100, 16]),
    ):
        slots_R, lens_R = fill(slots, lens)
        poison(out)
        graph.replay()
        used = len(slots)
        want = reference.paged_attention(
            q[:used].float(),
            *(pages.float() for pages in rows.pool.layer(0)),
            torch.from_numpy(rows.table[slots_R[:used]]),
            torch.arange(used + 1),
            torch.from_numpy(lens_R[:used].astype(np.int64)),
            rows.scale,
        ).to(rows.dtype)
        assert_close(f"slots {slots}", out[:used], want, rows.dtype)


@on_gpu
@needs_flashinfer
@pytest.mark.parametrize("attention", ["flashinfer", "split"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_engine_serves_with_it(dtype: str, attention: str, tmp_path) -> None:
    """Prompts of a group and alone, in chunks, decode by graphs of several buckets."""
    hf = write_tiny(tmp_path, "qwen2", head_dim=64, max_position_embeddings=512)
    config = EngineConfig(
        model=str(tmp_path),
        device="cuda",
        dtype=dtype,
        attention=attention,
        cache=CacheConfig(num_pages=400),
        scheduler=SchedulerConfig(max_running=16, max_chunk_tokens=48),
    )
    prompt = [5 + token % 90 for token in range(130)]
    requests = [
        *[request(f"group-{i}", prompt, seed=i, group="g", max_new_tokens=30) for i in range(6)],
        *[request(f"{i}", prompt[i:], seed=i, max_new_tokens=10 + 9 * i) for i in range(1, 7)],
        request("filtered", prompt[:20], seed=9, max_new_tokens=12, top_k=10),
    ]
    prompts = {one.rid: one.prompt_ids.tolist() for one in requests}
    with launch(config) as replica:
        replica.submit(requests)
        outputs = drain(replica)
        assert "flashinfer" in replica.state().attention
    for rid in ("group-0", "group-5", "6"):
        output = outputs[rid]
        want = exact_logprobs(hf, prompts[rid], output.token_ids)
        finer = 8 if dtype == "float16" else 1
        np.testing.assert_allclose(output.logprobs, want, atol=0.3 / finer, err_msg=rid)
        assert np.abs(output.logprobs - want).mean() < 0.05 / finer
