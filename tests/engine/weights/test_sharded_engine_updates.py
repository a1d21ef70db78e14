"""Updates of two tensor-parallel processes: every transport that reaches them, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.config import CacheConfig, EngineConfig, ParallelConfig
from engine.errors import ManifestMismatch, WeightUpdateError
from engine.protocol import BeginUpdate, CheckWeights, ReceiveBroadcast
from rollout.launch import launch
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.helpers.weight_engines import specs
from trainer_bridge.bridge import Publisher, PushOptions

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, "qwen2", tie_word_embeddings=True)
    return path


@pytest.fixture(scope="module")
def sharded(folder) -> Iterator[Any]:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=64, page_size=8),
        parallel=ParallelConfig(tp_size=2, timeout_s=30.0),
    )
    with launch(config) as replica:
        yield replica


def greedy(replica: Any, rid: str) -> list[int]:
    replica.submit([request(rid, PROMPT, temperature=0.0, max_new_tokens=8)])
    return list(drain(replica)[rid].token_ids)


@pytest.mark.slow
def test_every_transport_reaches_both_ranks_and_none_commits_alone(folder, sharded) -> None:
    version = 0
    for seed, transport in enumerate(("nccl", "cuda_ipc", "disk", "nccl"), start=1):
        mode = "in_place" if seed == 4 else "auto"
        model = tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)
        options = PushOptions(transport=transport, checksums=True, mode=mode, timeout_s=20.0)
        version += 1
        with Publisher(model, [sharded], options) as publisher:
            publisher.push(version)
            with make_replica(folder) as one:
                one.update_weights_inproc(
                    BeginUpdate(version=1),
                    [(name, p.detach()) for name, p in model.named_parameters()],
                )
                assert greedy(sharded, f"{transport}-{seed}") == greedy(one, "one")
    assert len(sharded.send(CheckWeights()).weights) == 2
    wrong = BeginUpdate(version=9, manifest=specs({"model.nothing": torch.zeros(1)}))
    with pytest.raises(ManifestMismatch, match="nothing"):
        sharded.send(wrong)
    sharded.send(BeginUpdate(version=9))
    with pytest.raises(WeightUpdateError, match="join it first"):
        sharded.send(ReceiveBroadcast(group="g", tensors=[]))
    assert sharded.state().version == version
