"""Routes that the engine returns are those that transformers computes for the same tokens, however
a sequence was scheduled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig, SpeculativeConfig
from engine.errors import UnsupportedOption
from engine.protocol import Abort, Pause, ReleaseMemory, Request, Resume, ResumeMemory
from rollout.launch import launch
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, request
from tests.helpers.exact_routes import check_exact
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import write_tiny
from tests.parity.test_tp_parity import PROMPT, config_of


def routed(rid: str, ids: list[int], start: int = 0, **sampling: Any) -> Request:
    return msgspec.structs.replace(
        request(rid, ids, **sampling), return_routed_experts=True, routed_experts_start_len=start
    )


def keeping(folder: Path, tp_size: int = 1, **changes: Any) -> EngineConfig:
    config = replace(config_of(folder, tp_size), return_routed_experts=True)
    return replace(config, **changes)


def open_replica(config: EngineConfig) -> InlineReplica:
    replica = launch(config)
    assert isinstance(replica, InlineReplica)
    return replica


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    return write_tiny(folder, "qwen3_moe"), folder


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_chunks_and_samples_of_a_prompt(family: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, family)
    asked = [
        routed("whole", PROMPT, temperature=0.0),
        routed("part", PROMPT[:17], 9, max_new_tokens=5),
        *(routed(f"drawn-{i}", PROMPT[:21], seed=i, group="g") for i in range(3)),
    ]
    config = keeping(tmp_path)
    config = replace(config, scheduler=replace(config.scheduler, max_chunk_tokens=7, overlap=True))
    with open_replica(config) as replica:
        replica.submit(asked)
        outputs = drain(replica)
        replica.submit([routed("again", [*PROMPT, 3, 4])])
        outputs |= drain(replica)
    for each in asked:
        check_exact(model, each.prompt_ids.tolist(), outputs[each.rid])
    check_exact(model, [*PROMPT, 3, 4], outputs["again"])
    assert outputs["again"].cached_tokens >= len(PROMPT) - 8


def test_pages_that_run_out(qwen: tuple[Any, Path]) -> None:
    model, folder = qwen
    config = keeping(folder, cache=replace(config_of(folder, 1).cache, num_pages=14, page_size=4))
    asked = [routed(str(i), PROMPT[i : i + 9], seed=i, max_new_tokens=24) for i in range(4)]
    with open_replica(config) as replica:
        replica.submit(asked)
        outputs = drain(replica)
    assert sum(output.num_retractions for output in outputs.values()) > 0
    for each in asked:
        check_exact(model, each.prompt_ids.tolist(), outputs[each.rid])


def test_drafts_that_are_rejected(qwen: tuple[Any, Path]) -> None:
    model, folder = qwen
    drafts = SpeculativeConfig(method="ngram", draft_tokens=3)
    asked = [routed("repeats", PROMPT[:5] * 4, temperature=0.0, max_new_tokens=40)]
    asked += [routed(f"drawn-{i}", PROMPT[:5] * 4, seed=i, max_new_tokens=20) for i in range(2)]
    with open_replica(keeping(folder, speculative=drafts)) as replica:
        replica.submit(asked)
        outputs = drain(replica)
    counts = [output.spec for output in outputs.values()]
    assert (
        sum(c.drafted - c.accepted for c in counts if c) > 0 < sum(c.accepted for c in counts if c)
    )
    for each in asked:
        check_exact(model, each.prompt_ids.tolist(), outputs[each.rid])


def test_pauses_and_memory_that_is_released(qwen: tuple[Any, Path]) -> None:
    model, folder = qwen
    config = keeping(folder)
    config = replace(config, memory=replace(config.memory, saver=True, cpu_backup=True))
    asked = [routed(rid, PROMPT, seed=i) for i, rid in enumerate(("stays", "goes", "left"))]
    with open_replica(config) as replica:
        replica.submit(asked)
        for _ in range(6):
            replica.step()
        replica.send(Abort(rid="goes"))
        replica.send(ReleaseMemory(pause="retract"))
        replica.send(ResumeMemory())
        ended = [output for output in replica.step() if output.finish is not None]
        replica.send(Resume())
        for _ in range(5):
            replica.step()
        replica.send(Pause(mode="abort"))
        ended += drain(replica).values()
    assert sorted(output.rid for output in ended) == ["goes", "left", "stays"]
    for output in ended:
        assert len(output.token_ids) > 1 and output.finish.type == "abort"
        check_exact(model, PROMPT, output)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [False, True])
def test_the_rank_that_answers_reads_them(ep: bool, qwen: tuple[Any, Path]) -> None:
    model, folder = qwen
    config = keeping(folder, 2)
    config = replace(config, parallel=replace(config.parallel, ep=ep))
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as replica:
        replica.submit([routed("a", PROMPT), routed("b", PROMPT[:11], seed=3)])
        outputs = drain(replica)
    check_exact(model, PROMPT, outputs["a"])
    check_exact(model, PROMPT[:11], outputs["b"])
    read = [results for results in executor.all_results if results[0].routes is not None]
    assert read and all(results[1].routes is None for results in read)


@pytest.mark.slow
def test_copies_of_the_model(qwen: tuple[Any, Path]) -> None:
    model, folder = qwen
    config = keeping(folder)
    config = replace(config, parallel=replace(config.parallel, dp_size=2))
    asked = [routed(str(i), PROMPT[: 10 + i], seed=i, max_new_tokens=6 + i) for i in range(5)]
    with open_replica(config) as replica:
        replica.submit(asked)
        outputs = drain(replica)
    for each in asked:
        check_exact(model, each.prompt_ids.tolist(), outputs[each.rid])


def test_a_model_without_experts_keeps_none(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    with pytest.raises(UnsupportedOption, match="has no experts") as caught:
        launch(keeping(tmp_path))
    assert caught.value.field == "return_routed_experts"


def test_an_engine_without_the_flag_keeps_none(qwen: tuple[Any, Path]) -> None:
    _, folder = qwen
    with open_replica(config_of(folder, 1)) as replica:
        replica.submit([routed("a", PROMPT), request("b", PROMPT[:3], max_new_tokens=2)])
        outputs = drain(replica)
        state = replica.state()
    finish = outputs["a"].finish
    assert (finish.error, finish.field) == ("InvalidRequest", "return_routed_experts")
    assert "--enable-return-routed-experts" in finish.message
    assert outputs["b"].routed_experts is None
    assert state.experts.layers == [0, 2] and not state.keeps_routes
    assert np.isfinite(outputs["b"].logprobs).all()
