"""Embeddings through the whole engine on a CPU, against transformers' own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.config import (
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from engine.protocol import Pause, Request, Resume
from rollout.launch import launch
from rollout.offline import embed, embed_request, generate
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

TOLERANCE = 2e-5
PROMPT = list(range(5, 60))
PROMPTS = {
    # One that begins like another, one that is the same, one of a single token.
    "long": PROMPT,
    "same": PROMPT,
    "branch": [*PROMPT[:40], 7, 8, 9],
    "short": PROMPT[:3],
    "one": [42],
}
POOLINGS = ("last", "mean")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3", "olmo2")


@torch.no_grad()
def wanted(model: Any, ids: list[int], pooling: str) -> np.ndarray:
    states = model.model(torch.tensor([ids])).last_hidden_state[0].float()
    return (states[-1] if pooling == "last" else states.mean(0)).numpy()


def requests() -> list[Request]:
    return [
        embed_request(f"{pooling} {rid}", np.array(ids, np.int32), pooling=pooling)
        for pooling in POOLINGS
        for rid, ids in PROMPTS.items()
    ]


def embeddings(replica: Any) -> dict[str, np.ndarray]:
    found = {}
    for output in generate(replica, requests()):
        assert output.finish is not None
        assert output.finish.type == "length" and output.finish.length == 0, output.finish
        assert len(output.token_ids) == 0 and output.embedding is not None
        assert output.embedding.dtype == np.float32
        found[output.rid] = output.embedding
    return found


def assert_embeddings(model: Any, found: dict[str, np.ndarray]) -> None:
    assert len(found) == len(POOLINGS) * len(PROMPTS)
    for rid, vector in found.items():
        pooling, _, name = rid.partition(" ")
        expected = wanted(model, PROMPTS[name], pooling)
        np.testing.assert_allclose(vector, expected, atol=TOLERANCE, err_msg=rid)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_the_hidden_states_of_transformers(family: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, family)
    with make_replica(tmp_path) as replica:
        assert replica.state().hidden_size == model.config.hidden_size
        assert_embeddings(model, embeddings(replica))


def test_a_decoder_that_was_saved_alone_is_served(tmp_path: Path) -> None:
    """As Qwen3-Embedding is: a tied model whose files name no tensor of "model."."""
    model = write_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    tensors = {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with make_replica(tmp_path) as replica:
        assert_embeddings(model, embeddings(replica))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_chunks_cache_and_batch_change_nothing(
    overlap: bool, prefix_cache: bool, tmp_path: Path
) -> None:
    model = write_tiny(tmp_path)
    small = {"max_chunk_tokens": 16, "max_step_tokens": 24, "max_running": 2}
    with make_replica(
        tmp_path, overlap=overlap, prefix_cache=prefix_cache, num_pages=20, **small
    ) as replica:
        for _ in range(2):
            assert_embeddings(model, embeddings(replica))
        assert (replica.state().num_cached_tokens > 0) is prefix_cache


def test_a_cached_prompt_is_computed_again_for_its_mean_alone(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    ids = [np.array(PROMPT, np.int32)]
    with make_replica(tmp_path) as replica:
        first, again = (embed(replica, ids)[0] for _ in range(2))
        mean, likewise = (embed(replica, ids, pooling="mean")[0] for _ in range(2))
    assert again.cached_tokens == len(PROMPT) - 1 and mean.cached_tokens == 0
    np.testing.assert_allclose(again.embedding, first.embedding, atol=TOLERANCE)
    assert likewise.embedding.tobytes() == mean.embedding.tobytes()


def test_one_engine_generates_and_embeds_in_the_same_steps(tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    asked = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    others = [request(f"g{n}", PROMPT[n : 9 + n], seed=n, **asked) for n in range(3)]
    with make_replica(tmp_path, max_chunk_tokens=16, max_step_tokens=24) as replica:
        alone = {output.rid: output.token_ids for output in generate(replica, others)}
        both = generate(replica, [*others[:1], *requests(), *others[1:]])
    found = {output.rid: output.embedding for output in both if output.embedding is not None}
    assert_embeddings(model, found)
    for output in both:
        if output.rid in alone:
            assert output.token_ids.tolist() == alone[output.rid].tolist()


@pytest.mark.parametrize("mode", ["keep", "retract"])
def test_a_pause_in_the_middle_of_a_prompt_changes_nothing(mode: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    with make_replica(tmp_path, max_chunk_tokens=16, max_step_tokens=16) as replica:
        replica.submit(requests())
        for _ in range(3):
            replica.step()
        replica.send(Pause(mode=mode))
        replica.send(Resume())
        outputs = {output.rid: output.embedding for output in drain(replica).values()}
    assert_embeddings(model, {rid: found for rid, found in outputs.items() if found is not None})


def test_embeddings_follow_an_update_and_name_its_version(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    new = tiny_hf("llama", seed=7)
    with make_replica(tmp_path, max_chunk_tokens=16, max_step_tokens=16) as replica:
        replica.submit([embed_request("over", np.array(PROMPT, np.int32), pooling="mean")])
        replica.step()
        push(new, version=1, replica=replica)
        spans = drain(replica)["over"].kv_spans
        assert [(span.version, span.start, span.end) for span in spans] == [(0, 0, 16), (1, 16, 55)]
        assert_embeddings(new, embeddings(replica))


def test_a_mean_in_bfloat16_is_summed_in_float32(tmp_path: Path) -> None:
    model = write_tiny(tmp_path, dtype=torch.bfloat16).float()
    with make_replica(tmp_path, dtype="bfloat16", max_chunk_tokens=16) as replica:
        (output,) = embed(replica, [np.array(PROMPT, np.int32)], pooling="mean")
    found = torch.from_numpy(output.embedding)
    assert (found.bfloat16().float() != found).any()
    # What 16 bits do to the hidden states themselves, and no more.
    expected = torch.from_numpy(wanted(model, PROMPT, "mean"))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


@pytest.mark.slow
def test_ranks_embed_as_one(tmp_path: Path) -> None:
    model = write_tiny(tmp_path, "qwen3")
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=100, page_size=8),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64, max_chunk_tokens=24),
        parallel=ParallelConfig(tp_size=2),
    )
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as replica:
        assert_embeddings(model, embeddings(replica))
    for results in executor.all_results:
        first, second = (
            [(own.row, own.values.tobytes()) for own in result.embeddings] for result in results
        )
        assert first == second


def test_prompts_beside_rows_that_draft(tmp_path: Path) -> None:
    """Steps whose lengths the rank alone knows give the embeddings to the rows that asked."""
    model = write_tiny(tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=400, page_size=8),
        scheduler=SchedulerConfig(max_running=16, max_step_tokens=64, max_chunk_tokens=16),
        speculative=SpeculativeConfig(method="ngram"),
    )
    fields = {"max_new_tokens": 40, "temperature": 0.0}
    drafting = [request(f"d{n}", [5, 6, 7] * (n + 2), **fields) for n in range(3)]
    with launch(config) as replica:
        replica.submit(drafting)
        for _ in range(6):
            replica.step()
        replica.submit(requests())
        outputs = drain(replica)
        assert replica.state().num_drafted_tokens > 0
    found = {rid: output.embedding for rid, output in outputs.items() if rid[0] != "d"}
    assert_embeddings(model, found)
