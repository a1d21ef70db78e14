"""Two GPUs against one: the same greedy text in float32, decode graphs on, and an end to every
wait when a rank is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from rollout.launch import launch
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, request
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.multi_gpu

PROMPT = list(range(5, 60))


def replica_of(folder: Path, tp_size: int, dtype: str = "float32") -> InlineReplica:
    config = EngineConfig(
        model=str(folder),
        dtype=dtype,
        device="cuda",
        cache=CacheConfig(num_pages=400, page_size=8),
        scheduler=SchedulerConfig(max_running=16, max_step_tokens=512),
        parallel=ParallelConfig(tp_size=tp_size, timeout_s=10.0),
    )
    replica = launch(config)
    assert isinstance(replica, InlineReplica)
    return replica


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "qwen3", head_dim=64, max_position_embeddings=2048, vocab_size=101)
    return folder


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "smollm3", "gemma3"])
def test_float32_text_and_logprobs_are_those_of_one_gpu(family: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, family, head_dim=64, max_position_embeddings=2048, vocab_size=101)
    outputs = []
    for tp_size in (1, 2):
        with replica_of(tmp_path, tp_size) as replica:
            common = {"temperature": 0.0, "max_new_tokens": 60}
            replica.submit([request(f"{n}", PROMPT[:n], **common) for n in (5, 31, 55)])
            replica.submit([request("drawn", PROMPT, seed=4, max_new_tokens=60)])
            outputs.append(drain(replica))
    alone, together = outputs
    for rid, want in alone.items():
        assert together[rid].token_ids.tolist() == want.token_ids.tolist(), rid
        np.testing.assert_allclose(together[rid].logprobs, want.logprobs, atol=1e-3, err_msg=rid)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_lost_between_graph_replays_ends_the_replica(tiny: Path, fault: int) -> None:
    with replica_of(tiny, 2, "bfloat16") as replica:
        replica.submit([request("long", PROMPT, max_new_tokens=1900)])
        for _ in range(20):
            replica.step()
        os.kill(replica._leader._executor._ranks[0]._process.pid, fault)
        finish = drain(replica)["long"].finish
        assert finish is not None
        assert finish.error == "EngineDead"
        assert "rank 1" in str(finish.message)
