"""Ranks that divide experts, whole or a slice of each, give the text of one rank.

Configurations are such that no choice of an expert hangs on the last bits of its score.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.errors import ModelError, UnsupportedOption
from engine.protocol import CheckWeights, RequestOutput
from rollout.launch import launch
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import write_tiny
from tests.parity.test_tp_parity import PROMPT, config_of, probes, scored

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {},
    "mixtral": {"num_experts_per_tok": 3},
    "glm4_moe": {},
}


def config_with(folder: Path, tp_size: int, ep: bool, dtype: str = "float32") -> EngineConfig:
    config = config_of(folder, tp_size, dtype)
    return replace(config, parallel=replace(config.parallel, ep=ep))


def run(
    folder: Path, tp_size: int, ep: bool = False, dtype: str = "float32"
) -> tuple[dict[str, RequestOutput], ThreadedExecutor]:
    config = config_with(folder, tp_size, ep, dtype)
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as replica:
        replica.submit([*probes(), *scored()])
        return drain(replica), executor


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_text_is_that_of_one_rank_and_of_transformers(family: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, family, **FAMILIES[family])
    alone, _ = run(tmp_path, 1)
    for rid in ("greedy", "drawn-1"):
        prompt = PROMPT if rid == "greedy" else PROMPT[:20]
        want = exact_logprobs(model, prompt, alone[rid].token_ids.tolist())
        np.testing.assert_allclose(alone[rid].logprobs, want, atol=1e-4, err_msg=rid)
    sizes = (2, 4) if family == "qwen2_moe" else (2,)
    for tp_size, ep in ((size, ep) for size in sizes for ep in (False, True)):
        together, ranks = run(tmp_path, tp_size, ep)
        for rid, one in alone.items():
            got = together[rid]
            assert got.token_ids.tolist() == one.token_ids.tolist(), (tp_size, ep, rid)
            np.testing.assert_allclose(got.logprobs, one.logprobs, atol=1e-4, err_msg=rid)
        for results in ranks.all_results:
            for result in results[1:]:
                assert result.token_ids.tobytes() == results[0].token_ids.tobytes()
                assert result.logprobs.tobytes() == results[0].logprobs.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("ep", [False, True])
def test_every_rank_samples_the_same_bits_in_bfloat16(ep: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen2_moe")
    _, executor = run(tmp_path, 2, ep, "bfloat16")
    assert len(executor.all_results) > 10
    for results in executor.all_results:
        for result in results[1:]:
            assert result.token_ids.tobytes() == results[0].token_ids.tobytes()
            assert result.logprobs.tobytes() == results[0].logprobs.tobytes()


@pytest.mark.slow
def test_processes_that_hold_half_of_the_experts_each(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen3_moe")
    want = run(tmp_path, 1)[0]["greedy"].token_ids.tolist()
    replica = launch(config_with(tmp_path, 2, ep=True))
    assert isinstance(replica, InlineReplica)
    with replica:
        replica.submit([probes()[0]])
        assert drain(replica)["greedy"].token_ids.tolist() == want
        first, second = replica.send(CheckWeights(action="layout")).weights
    for expert in range(8):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        whole = [[(0, 32, 1), (0, 64, 1)]]
        assert first.layout[name].pieces == (whole if expert < 4 else [])
        assert second.layout[name].pieces == (whole if expert >= 4 else [])


def test_copies_of_a_model_with_experts(tmp_path: Path) -> None:
    model = write_tiny(tmp_path, "mixtral", **FAMILIES["mixtral"])
    with make_replica(tmp_path, dp_size=2) as replica:
        asked = [request(rid, PROMPT, temperature=0.0, max_new_tokens=8) for rid in "ab"]
        replica.submit(asked)
        outputs = drain(replica)
    for rid in "ab":
        tokens = outputs[rid].token_ids.tolist()
        want = exact_logprobs(model, PROMPT, tokens)
        np.testing.assert_allclose(outputs[rid].logprobs, want, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "ep", "field"),
    [
        ("qwen3_moe", {"num_experts": 7}, True, "num_local_experts"),
        ("mixtral", {"num_local_experts": 7}, True, "num_local_experts"),
        ("glm4_moe", {"n_routed_experts": 6, "n_group": 1}, True, "n_routed_experts"),
        ("qwen3_moe", {"moe_intermediate_size": 34}, False, "moe_intermediate_size"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 46}, True, "shared_expert_interm"),
    ],
)
def test_what_ranks_do_not_divide_is_refused(
    family: str, changes: dict[str, int], ep: bool, field: str, tmp_path: Path
) -> None:
    write_tiny(tmp_path, family, **changes)
    with pytest.raises(ModelError, match="4 ranks do not divide") as caught:
        ThreadedExecutor(config_with(tmp_path, 4, ep))
    assert caught.value.field.startswith(field)


def test_experts_are_divided_within_one_copy_only(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen3_moe")
    config = EngineConfig(
        model=str(tmp_path), device="cpu", parallel=ParallelConfig(dp_size=2, ep=True)
    )
    with pytest.raises(UnsupportedOption, match="2 copies of --dp") as caught:
        launch(config)
    assert caught.value.field == "parallel.ep"


def test_one_rank_holds_all_experts_with_the_flag_too(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen3_moe")
    wanted, _ = run(tmp_path, 1)
    got, _ = run(tmp_path, 1, ep=True)
    assert got["greedy"].token_ids.tolist() == wanted["greedy"].token_ids.tolist()


def test_weights_of_experts_are_not_quantised(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen3_moe")
    with pytest.raises(UnsupportedOption, match="'int8' is not built for experts") as caught:
        launch(EngineConfig(model=str(tmp_path), device="cpu", quantization="int8"))
    assert caught.value.field == "quantization"
