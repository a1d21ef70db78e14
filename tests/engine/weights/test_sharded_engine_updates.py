"""Updates of two ranks, halves of a model or copies of it: every transport that reaches them, and
refusals."""

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


@pytest.fixture(scope="module", params=[(1, 2), (2, 1)], ids=["halves", "copies"])
def sharded(folder, request: pytest.FixtureRequest) -> Iterator[Any]:
    dp_size, tp_size = request.param
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=64, page_size=8),
        parallel=ParallelConfig(dp_size=dp_size, tp_size=tp_size, timeout_s=30.0),
    )
    with launch(config) as replica:
        yield replica


def greedy(replica: Any, rid: str) -> list[int]:
    """What two requests at once get, which is the same; of two copies each serves one."""
    names = [f"{rid}-{index}" for index in range(2)]
    replica.submit([request(name, PROMPT, temperature=0.0, max_new_tokens=8) for name in names])
    finals = drain(replica)
    first, second = (list(finals[name].token_ids) for name in names)
    assert first == second
    return first


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
                expected = greedy(one, "one")
            assert greedy(sharded, f"{transport}-{seed}") == expected
    assert len(sharded.send(CheckWeights()).weights) == 2
    wrong = BeginUpdate(version=9, manifest=specs({"model.nothing": torch.zeros(1)}))
    with pytest.raises(ManifestMismatch, match="nothing"):
        sharded.send(wrong)
    sharded.send(BeginUpdate(version=9))
    with pytest.raises(WeightUpdateError, match="join it first"):
        sharded.send(ReceiveBroadcast(group="g", tensors=[]))
    assert sharded.state().version == version
