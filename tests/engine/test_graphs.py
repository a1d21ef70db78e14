"""Decode steps as graph replays against the same steps run kernel by kernel."""

from __future__ import annotations

import numpy as np
import pytest

from engine.attention import triton
from engine.attention.triton import TritonDecode
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.graphs import num_kinds, row_buckets
from rollout.launch import launch
from rollout.scheduler.speculative.ladder import row_bucket
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

PROMPT = list(range(5, 45))


@pytest.mark.parametrize("max_rows", [1, 3, 16, 256, 1024, 3000])
def test_buckets_cover_every_batch(max_rows: int) -> None:
    buckets = row_buckets(max_rows)
    assert buckets == sorted(set(buckets)) and buckets[-1] == max_rows
    assert buckets[0] == 1


@pytest.mark.parametrize(
    "max_rows,max_verified,draft_tokens,count",
    [
        (8, 8, 0, 4),
        (8, 16, 1, 8),
        (8, 32, 3, 12),
        # A row of 5 drafts takes the graph of 7.
        (8, 64, 5, 16),
        # Of 512 rows 64 have 7 drafts, 128 have 3 and 256 have one.
        (512, 512, 7, 17 + 13 + 11 + 9),
    ],
)
def test_memory_is_planned_for_a_graph_of_every_kind(
    max_rows: int, max_verified: int, draft_tokens: int, count: int
) -> None:
    assert num_kinds(max_rows, max_verified, draft_tokens) == count


def test_the_leader_tells_rows_apart_as_graphs_pad_them() -> None:
    buckets = row_buckets(3072)
    found = {row_bucket(rows) for rows in range(1, 3073)}
    assert sorted(found) == buckets


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-graphs")
    return folder, write_tiny(folder, "qwen2", head_dim=64, max_position_embeddings=2048)


def outputs_of(folder, requests, **options):
    with make_replica(folder, device="cuda", **options) as replica:
        replica.submit(requests)
        return drain(replica)


def assert_equal(got, want) -> None:
    assert got.keys() == want.keys()
    for rid, output in want.items():
        assert got[rid].token_ids.tolist() == output.token_ids.tolist(), rid
        np.testing.assert_array_equal(got[rid].logprobs, output.logprobs, err_msg=rid)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "auto"), ("bfloat16", "auto"), ("float16", "auto"), ("bfloat16", "fp8_e4m3")],
)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_full_bucket_is_bit_equal_to_eager(tiny, rows: int, dtype: str, kv_dtype: str) -> None:
    requests = [
        request(f"{i}", PROMPT, seed=i, max_new_tokens=50, temperature=0.0 if i % 2 else 1.0)
        for i in range(rows)
    ]
    # All begin and end in the same step: a batch that shrinks would be padded, and products
    # of other sizes round in another order.
    options = {"dtype": dtype, "num_pages": 1500, "prefix_cache": False, "max_step_tokens": 4096}
    options["kv_dtype"] = kv_dtype
    graphs = outputs_of(tiny[0], requests, **options)
    assert_equal(graphs, outputs_of(tiny[0], requests, cuda_graphs=False, **options))


@pytest.mark.gpu
def test_graphs_captured_at_start_are_those_a_step_needs(tiny) -> None:
    requests = [request(f"{i}", PROMPT, seed=i, max_new_tokens=20) for i in range(5)]
    config = EngineConfig(
        model=str(tiny[0]),
        device="cuda",
        dtype="float32",
        capture_at_start=True,
        cache=CacheConfig(num_pages=300, page_size=8),
        scheduler=SchedulerConfig(max_running=8),
    )
    with launch(config) as replica:
        graphs = replica._leader._executor._worker._graphs._graphs
        captured = len(graphs)
        assert captured >= len(row_buckets(8))
        replica.submit(requests)
        early = drain(replica)
        assert len(graphs) == captured, "a step captured what start-up had not"
    assert_equal(early, outputs_of(tiny[0], requests, num_pages=300, max_running=8))


@pytest.mark.gpu
def test_padded_buckets_and_long_rows_give_the_same_tokens(tiny) -> None:
    requests = [
        request(f"{i}", PROMPT[: 5 + i], seed=i, max_new_tokens=20 + 11 * i) for i in range(11)
    ]
    requests.append(request("long", PROMPT * 25, seed=50, max_new_tokens=80))
    graphs = outputs_of(tiny[0], requests, max_running=12)
    eager = outputs_of(tiny[0], requests, max_running=12, cuda_graphs=False)
    for rid, want in eager.items():
        assert graphs[rid].token_ids.tolist() == want.token_ids.tolist(), rid
        np.testing.assert_allclose(graphs[rid].logprobs, want.logprobs, atol=1e-4, err_msg=rid)


@pytest.mark.gpu
def test_rows_that_need_more_leave_the_graph_and_plain_rows_come_back(tiny) -> None:
    requests = [
        request("plain", PROMPT, seed=1, max_new_tokens=40),
        request("filtered", PROMPT, seed=2, max_new_tokens=10, top_k=5),
        request("penalised", PROMPT, seed=3, max_new_tokens=15, presence_penalty=0.5),
    ]
    graphs = outputs_of(tiny[0], requests)
    eager = outputs_of(tiny[0], requests, cuda_graphs=False)
    for rid, want in eager.items():
        assert graphs[rid].token_ids.tolist() == want.token_ids.tolist(), rid


@pytest.mark.gpu
def test_graphs_serve_new_weights(tiny) -> None:
    new = tiny_hf("qwen2", seed=1, head_dim=64, max_position_embeddings=2048)
    with make_replica(tiny[0], device="cuda") as replica:
        replica.submit([request("before", PROMPT, seed=3)])
        drain(replica)
        push(new.cuda(), 1, replica)
        replica.submit([request("after", PROMPT, seed=3, max_new_tokens=30)])
        output = drain(replica)["after"]
    want = exact_logprobs(new.cpu(), PROMPT, output.token_ids)
    np.testing.assert_allclose(output.logprobs, want, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("bfloat16", "auto"), ("float16", "auto"), ("bfloat16", "fp8_e4m3")],
)
def test_a_prompt_group_is_bit_equal_to_the_same_rows_without_tiles(
    tiny, monkeypatch, dtype: str, kv_dtype: str
) -> None:
    """Sixteen samples of each of five prompts: their shared pages read once, or row by row."""
    prompts = [[(7 * i + 13 * n) % 90 + 5 for i in range(300)] for n in range(5)]
    requests = [
        request(f"{n}-{i}", prompts[n], seed=100 * n + i, group=f"{n}", max_new_tokens=20 + i)
        for n in range(5)
        for i in range(16)
    ]
    options = {"dtype": dtype, "num_pages": 3000, "max_running": 96, "max_step_tokens": 2048}
    options["kv_dtype"] = kv_dtype
    seen = []
    refresh = TritonDecode.refresh

    def watch(self, slots, kv_lens, **exact) -> None:
        refresh(self, slots, kv_lens, **exact)
        seen.append(self.step.shared is not None)

    monkeypatch.setattr(triton, "SAVED_BYTES", 1)
    monkeypatch.setattr(triton, "PROGRAMS", 1)
    monkeypatch.setattr(TritonDecode, "refresh", watch)
    grouped = outputs_of(tiny[0], requests, **options)
    assert any(seen), "no step had a group"
    monkeypatch.setattr(TritonDecode, "refresh", lambda self, slots, kv_lens, **exact: None)
    assert_equal(grouped, outputs_of(tiny[0], requests, **options))
