"""A real small engine with int8 weights: what it computes, and updates, sleep and ranks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.pools
import engine.worker
from engine.config import CacheConfig, EngineConfig, MemoryConfig, ParallelConfig, SchedulerConfig
from engine.errors import UnsupportedOption
from engine.memory import Needs, plan_memory
from engine.protocol import (
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    FlushCache,
    LoadFromDisk,
    ReleaseMemory,
    RequestOutput,
    ResumeMemory,
)
from rollout.launch import launch
from rollout.replica.base import Replica
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, request
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import write_tiny
from trainer_bridge import push
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.stored import check_stored

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8, 9], list(range(3, 20)), [40, 41]]
SHAPE: dict[str, Any] = {"tie_word_embeddings": True, "num_key_value_heads": 2}


def config_of(folder: Path, tp_size: int = 1, scheme: str = "int8", **fields: Any) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="bfloat16",
        quantization=scheme,  # type: ignore[arg-type]
        cache=CacheConfig(num_pages=64, page_size=16),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64),
        parallel=ParallelConfig(tp_size=tp_size, timeout_s=60.0),
        **fields,
    )


def answers(replica: Replica, turn: str = "a") -> dict[str, RequestOutput]:
    replica.send(FlushCache())
    replica.submit(
        [
            request(f"{turn}{index}", prompt, temperature=0.0, max_new_tokens=8)
            for index, prompt in enumerate(PROMPTS)
        ]
    )
    return {rid[1:]: output for rid, output in drain(replica).items()}


def assert_same(got: dict[str, RequestOutput], want: dict[str, RequestOutput]) -> None:
    for rid, output in want.items():
        assert got[rid].token_ids.tolist() == output.token_ids.tolist()
        assert got[rid].logprobs.tolist() == output.logprobs.tolist()


def run(folder: Path, **options: Any) -> dict[str, RequestOutput]:
    with launch(config_of(folder, **options)) as replica:
        return answers(replica)


def prompt_logprobs(folder: Path, scheme: str) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, 60, 48).tolist()
    with launch(config_of(folder, scheme=scheme)) as replica:
        plain = request("scored", ids, temperature=0.0, max_new_tokens=1)
        fields = {name: getattr(plain, name) for name in plain.__struct_fields__}
        replica.submit([type(plain)(**{**fields, "prompt_logprob_start": 0})])
        found = drain(replica)["scored"].prompt_logprobs
    assert found is not None
    return found


def test_logprobs_are_near_those_of_bfloat16(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", **SHAPE)
    got, want = prompt_logprobs(tmp_path, "int8"), prompt_logprobs(tmp_path, "none")
    difference = np.abs(got - want)[1:]
    assert 0 < difference.mean() < 0.1


def test_a_push_leaves_the_engine_that_a_fresh_start_makes(tmp_path: Path) -> None:
    write_tiny(tmp_path / "old", "llama", **SHAPE)
    model = write_tiny(tmp_path / "new", "llama", seed=1, **SHAPE)
    with launch(config_of(tmp_path / "old")) as replica:
        before = answers(replica)
        push(model, 1, replica)
        after = answers(replica, "b")
        check_stored(PlainSource(model), replica)
        sums = replica.send(CheckWeights()).weights
    assert_same(after, run(tmp_path / "new"))
    assert any(after[rid].logprobs.tolist() != before[rid].logprobs.tolist() for rid in before)
    with launch(config_of(tmp_path / "new")) as fresh:
        assert fresh.send(CheckWeights()).weights[0].checksums == sums[0].checksums


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_take_an_update(tp_size: int, tmp_path: Path) -> None:
    write_tiny(tmp_path / "old", "llama", **SHAPE)
    model = write_tiny(tmp_path / "new", "llama", seed=1, **SHAPE)
    sums = []
    for folder in ("old", "new"):
        config = config_of(tmp_path / folder, tp_size)
        executor = ThreadedExecutor(config)
        with InlineReplica(config, executor) as replica:
            if folder == "old":
                replica.send(BeginUpdate(version=1))
                replica.send(LoadFromDisk(path=str(tmp_path / "new")))
                replica.send(CommitUpdate(version=1))
            outputs = answers(replica)
            check_stored(PlainSource(model), replica)
            sums.append([report.checksums for report in replica.send(CheckWeights()).weights])
            sums[-1].append({rid: out.logprobs.tolist() for rid, out in outputs.items()})
    assert sums[0] == sums[1]


def test_weights_come_back_from_sleep(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", **SHAPE)
    with launch(config_of(tmp_path, memory=MemoryConfig(saver=True, cpu_backup=True))) as replica:
        before = answers(replica)
        [released] = replica.send(ReleaseMemory()).memory
        replica.send(ResumeMemory())
        assert_same(answers(replica, "b"), before)
    with launch(config_of(tmp_path, scheme="none", memory=MemoryConfig(saver=True))) as plain:
        [whole] = plain.send(ReleaseMemory()).memory
    assert released.tags["weights"] < whole.tags["weights"]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_room_is_reserved_for_full_tensors_as_they_come(
    tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny(tmp_path, "llama", **SHAPE)
    config = config_of(tmp_path, tp_size, memory=MemoryConfig(reserve_shadow=True))
    planned: list[Needs] = []

    def plan(*args: Any, needs: Needs, **more: Any) -> Any:
        planned.append(needs)
        return plan_memory(*args, needs=needs, **more)

    monkeypatch.setattr(engine.pools, "plan_memory", plan)
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor):
        assert len(planned) == tp_size
        full = 2 * sum(p.numel() for p in model.parameters())
        stored = [sum(p.nbytes for p in r._worker._model.parameters()) for r in executor._ranks]
        assert [needs.shadow for needs in planned] == [full] * tp_size
        assert sorted(needs.weights for needs in planned) == sorted(stored)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-channel", "int4"])
def test_other_schemes_are_refused_by_name(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path, "llama")
    monkeypatch.delattr(engine.worker, "load_initial")
    with pytest.raises(UnsupportedOption, match=scheme) as refusal:
        launch(config_of(tmp_path, scheme=scheme))
    assert refusal.value.field == "quantization"


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_gpu_samples_alike_after_an_update(cuda_graphs: bool, tmp_path: Path) -> None:
    """Graphs that were captured before it read what it wrote."""
    shape = {**SHAPE, "head_dim": 32}
    dtype = torch.bfloat16
    write_tiny(tmp_path / "old", "qwen2", dtype=dtype, **shape)
    model = write_tiny(tmp_path / "new", "qwen2", seed=1, dtype=dtype, **shape).cuda()
    found = []
    for folder in ("old", "new"):
        config = EngineConfig(
            model=str(tmp_path / folder),
            device="cuda",
            quantization="int8",
            cuda_graphs=cuda_graphs,
            cache=CacheConfig(num_pages=64, page_size=16),
            scheduler=SchedulerConfig(max_running=8, max_step_tokens=64),
        )
        with launch(config) as replica:
            answers(replica)
            if folder == "old":
                push(model, 1, replica)
            check_stored(PlainSource(model), replica)
            found.append(answers(replica, "b"))
    torch.cuda.empty_cache()
    assert_same(found[0], found[1])
