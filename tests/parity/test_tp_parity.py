"""Tensor-parallel ranks give what one rank gives: the same greedy text in float32, the same
logprobs up to rounding, and the same bits on every rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from engine.errors import ModelError
from engine.protocol import BeginUpdate, CommitUpdate, LoadFromDisk, RequestOutput
from engine.protocol.deadlines import MAX_TIMEOUT_S, MEET_S
from rollout.launch import launch
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, request
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 45))
# What the default model is made of: tied embeddings, several query heads a KV head, no bias.
DEFAULT_LIKE: dict[str, Any] = {"tie_word_embeddings": True, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "default-like": ("llama", DEFAULT_LIKE),
    "odd vocabulary, biases": ("qwen2", {"vocab_size": 97}),
    "head norms, one KV head": ("qwen3", {"vocab_size": 101, "num_key_value_heads": 1}),
    "norms over all heads": ("olmo2", {}),
    "norms over one KV head": ("olmo2", {"num_key_value_heads": 1}),
    "windows, scaled embeddings": ("gemma3", {}),
    "layers without positions": ("smollm3", {}),
    "attention biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


def config_of(
    folder: Path, tp_size: int, dtype: str = "float32", *, collective_s: float = MEET_S
) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype=dtype,
        device="cpu",
        cache=CacheConfig(num_pages=100, page_size=8),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64, max_chunk_tokens=24),
        parallel=ParallelConfig(tp_size=tp_size, timeout_s=collective_s),
    )


def probes() -> list:
    greedy = {"temperature": 0.0, "max_new_tokens": 12}
    return [
        request("greedy", PROMPT, **greedy),
        request("short", PROMPT[:3], **greedy),
        request("penalised", PROMPT[:9], repetition_penalty=1.3, **greedy),
        *[request(f"drawn-{i}", PROMPT[:20], seed=i, group="g", max_new_tokens=8) for i in (1, 2)],
        request("filtered", PROMPT[:20], seed=3, top_k=5, top_p=0.9, max_new_tokens=8),
    ]


def scored() -> list:
    plain = request("scored", PROMPT[:30], temperature=0.0, max_new_tokens=3)
    fields = {name: getattr(plain, name) for name in plain.__struct_fields__}
    return [type(plain)(**{**fields, "top_logprobs": 4, "prompt_logprob_start": 0})]


def run(
    folder: Path, tp_size: int, dtype: str = "float32"
) -> tuple[dict[str, RequestOutput], ThreadedExecutor]:
    config = config_of(folder, tp_size, dtype)
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as replica:
        replica.submit([*probes(), *scored()])
        return drain(replica), executor


@pytest.mark.parametrize("name", list(MODELS))
def test_float32_text_is_that_of_one_rank(name: str, tmp_path: Path) -> None:
    arch, overrides = MODELS[name]
    write_tiny(tmp_path, arch, **overrides)
    alone, executor = run(tmp_path, 1)
    for tp_size in (2, 4):
        together, ranks = run(tmp_path, tp_size)
        for rid, want in alone.items():
            got = together[rid]
            assert got.token_ids.tolist() == want.token_ids.tolist(), (tp_size, rid)
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4, err_msg=rid)
        assert_scores_agree(together["scored"], alone["scored"])
        assert (ranks.facts.tp_size, ranks.facts.num_pages) == (tp_size, 100)
        assert (executor.facts.collectives, ranks.facts.collectives) == ("one rank", "gloo")
        assert ranks.facts.num_parameters == executor.facts.num_parameters


def assert_scores_agree(got: RequestOutput, want: RequestOutput) -> None:
    assert got.top is not None and want.top is not None
    assert got.prompt_logprobs is not None and want.prompt_logprobs is not None
    np.testing.assert_allclose(got.prompt_logprobs, want.prompt_logprobs, atol=1e-4)
    assert got.top.ids.tolist() == want.top.ids.tolist()
    np.testing.assert_allclose(got.top.logprobs, want.top.logprobs, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_samples_the_same_bits(dtype: str, tmp_path: Path) -> None:
    """No rank is told what another sampled, so they must agree of themselves."""
    write_tiny(tmp_path, "llama", **DEFAULT_LIKE)
    _, executor = run(tmp_path, 4, dtype)
    assert len(executor.all_results) > 10
    for results in executor.all_results:
        for result in results[1:]:
            assert result.token_ids.tobytes() == results[0].token_ids.tobytes()
            assert result.logprobs.tobytes() == results[0].logprobs.tobytes()


def test_bfloat16_is_close(tmp_path: Path) -> None:
    """The first token of each row has the same context however many ranks there are."""
    write_tiny(tmp_path, "llama", **DEFAULT_LIKE)
    alone, _ = run(tmp_path, 1, "bfloat16")
    for tp_size in (2, 4):
        together, _ = run(tmp_path, tp_size, "bfloat16")
        got, want = together["scored"].prompt_logprobs, alone["scored"].prompt_logprobs
        assert got is not None and want is not None
        assert np.abs(got - want).max() < 0.3
        assert np.abs(got - want).mean() < 0.05


def test_an_update_lands_in_every_shard(tmp_path: Path) -> None:
    write_tiny(tmp_path / "old", "llama", **DEFAULT_LIKE)
    write_tiny(tmp_path / "new", "llama", seed=1, **DEFAULT_LIKE)
    config = config_of(tmp_path / "old", 2)
    with InlineReplica(config, ThreadedExecutor(config)) as replica:
        replica.send(BeginUpdate(version=1))
        replica.send(LoadFromDisk(path=str(tmp_path / "new")))
        replica.send(CommitUpdate(version=1))
        replica.submit([probes()[0]])
        updated = drain(replica)["greedy"].token_ids.tolist()
    assert updated == run(tmp_path / "new", 1)[0]["greedy"].token_ids.tolist()


def spawned_text(folder: Path, tp_size: int) -> list[int]:
    """Greedy text of ranks in processes of their own, which must all leave at the end."""
    replica = launch(config_of(folder, tp_size))
    assert isinstance(replica, InlineReplica)
    with replica:
        assert replica.state().tp_size == tp_size
        replica.submit([probes()[0]])
        tokens = drain(replica)["greedy"].token_ids.tolist()
        ranks = [rank._process for rank in replica._leader._executor._ranks]
    assert [rank.poll() for rank in ranks] == [0] * (tp_size - 1)
    return tokens


def test_two_processes_give_the_text_of_one(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", **DEFAULT_LIKE)
    want = run(tmp_path, 1)[0]["greedy"].token_ids.tolist()
    assert spawned_text(tmp_path, 2) == want


@pytest.mark.slow
def test_four_processes_give_the_text_of_one(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", **DEFAULT_LIKE)
    want = run(tmp_path, 1)[0]["greedy"].token_ids.tolist()
    assert spawned_text(tmp_path, 4) == want


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_ends_the_replica(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", **DEFAULT_LIKE)
    # No test may take as long as that: only its absence can end the wait.
    replica = launch(config_of(tmp_path, 2, collective_s=MAX_TIMEOUT_S))
    assert isinstance(replica, InlineReplica)
    with replica:
        replica.submit([request("long", PROMPT, temperature=0.0, max_new_tokens=60)])
        for _ in range(10):
            replica.step()
        os.kill(replica._leader._executor._ranks[0]._process.pid, signal.SIGKILL)
        finish = drain(replica)["long"].finish
        assert finish is not None
        assert finish.error == "EngineDead"
        assert "rank 1" in str(finish.message)


def test_heads_that_ranks_do_not_divide_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    with pytest.raises(ModelError, match="4 ranks do not divide") as caught:
        ThreadedExecutor(config_of(tmp_path, 4))
    assert caught.value.field == "num_attention_heads"
