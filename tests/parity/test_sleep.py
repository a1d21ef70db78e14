"""A real small engine before and after sleep: bit-equal, on a CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import CacheConfig, EngineConfig, MemoryConfig, SchedulerConfig
from engine.errors import MemoryReleased, UnsupportedOption
from engine.protocol import FlushCache, Pause, ReleaseMemory, Resume, ResumeMemory
from rollout.launch import launch
from rollout.replica.base import Replica
from tests.helpers.engines import drain, request
from tests.helpers.tiny_models import write_tiny
from trainer_bridge import push

PROMPTS = [[5, 6, 7, 8, 9], list(range(3, 20)), [40, 41]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "qwen2", tie_word_embeddings=True, head_dim=32)


def make(folder: Path, device: str, **memory: bool) -> Replica:
    return launch(
        EngineConfig(
            model=str(folder),
            device=device,
            dtype="float32",
            memory=MemoryConfig(**memory),
            cache=CacheConfig(num_pages=64, page_size=16),
            scheduler=SchedulerConfig(max_running=8, max_step_tokens=64),
        )
    )


def greedy(replica: Replica, turn: str) -> list[tuple[list[int], list[float]]]:
    """Tokens and logprobs of every prompt, from an empty cache."""
    replica.send(FlushCache())
    rids = [f"{turn}{index}" for index in range(len(PROMPTS))]
    replica.submit(
        [request(rid, prompt, temperature=0.0) for rid, prompt in zip(rids, PROMPTS, strict=True)]
    )
    outputs = drain(replica)
    return [(outputs[rid].token_ids.tolist(), outputs[rid].logprobs.tolist()) for rid in rids]


@pytest.mark.parametrize("device", DEVICES)
def test_with_a_backup_nothing_has_to_be_published(tiny, device: str) -> None:
    with make(tiny[0], device, saver=True, cpu_backup=True) as replica:
        before = greedy(replica, "a")
        for turn in "bcd":
            [released] = replica.send(ReleaseMemory()).memory
            assert released.tags["weights"] > 0 and released.tags["kv_cache"] > 0
            [again] = replica.send(ReleaseMemory()).memory
            assert again.tags == {}
            [resumed] = replica.send(ResumeMemory()).memory
            assert resumed.tags == released.tags
            assert greedy(replica, turn) == before


@pytest.mark.parametrize("device", DEVICES)
def test_without_one_the_same_weights_published_again_give_the_same(tiny, device: str) -> None:
    folder, model = tiny
    with make(folder, device, saver=True) as replica:
        before = greedy(replica, "a")
        replica.send(ReleaseMemory())
        with pytest.raises(MemoryReleased, match="resume 'weights' first"):
            push(model, 1, replica)
        with pytest.raises(MemoryReleased, match="weights, then kv_cache, then cuda_graph"):
            replica.send(ResumeMemory(tags=["kv_cache"]))
        replica.send(ResumeMemory(tags=["weights"]))
        push(model, 1, replica)
        replica.send(ResumeMemory())
        assert greedy(replica, "b") == before


@pytest.mark.parametrize("device", DEVICES)
def test_retracted_requests_sleep_along(tiny, device: str) -> None:
    with make(tiny[0], device, saver=True, cpu_backup=True) as replica:
        [(tokens, logprobs), *_] = greedy(replica, "a")
        replica.submit([request("x", PROMPTS[0], temperature=0.0)])
        for _ in range(6):
            replica.step()
        replica.send(Pause(mode="retract"))
        replica.send(ReleaseMemory())
        replica.send(ResumeMemory())
        replica.send(Resume())
        output = drain(replica)["x"]
        assert output.token_ids.tolist() == tokens
        assert output.logprobs.tolist() == pytest.approx(logprobs, abs=1e-4)


def test_an_engine_without_the_saver_refuses(tiny) -> None:
    with make(tiny[0], "cpu") as replica:
        with pytest.raises(UnsupportedOption, match=r"memory\.saver"):
            replica.send(ReleaseMemory())
        assert len(greedy(replica, "a")) == 3, "and goes on"
