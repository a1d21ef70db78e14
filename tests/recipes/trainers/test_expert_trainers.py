"""Mixtures of experts on several processes learn what they learn on one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routers import routers_of
from recipes.trainers.routing_options import RoutingOptions
from recipes.world import World
from tests.helpers import expert_ranks as ranks
from tests.helpers.rank_processes import run_ranks
from tests.helpers.trainer_ranks import times
from tests.trainer_bridge.adapters.test_sharded_sources import from_shards
from trainer_bridge.adapters.buffers import is_sent_buffer, sent_buffers
from trainer_bridge.adapters.plain import named_tensors

pytestmark = pytest.mark.slow
BACKENDS = ["zero1", "zero3", "fsdp"]


@pytest.fixture(scope="module", params=BACKENDS)
def sharded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], Path]:
    """What two processes saw of a back end, and where they wrote."""
    if request.param != "fsdp":
        pytest.importorskip("deepspeed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp(request.param)
    return run_ranks(functools.partial(ranks.expert_trainers, request.param), 2, folder), folder


def alone(
    family: str, options: Any, dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Any]]:
    shelf = RouteShelf()
    trainer = ranks.plain(family, options, shelf, dtype)
    return trainer, ranks.learnt(trainer, ranks.batches(family, World(), shelf), World())


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return alone("qwen3_moe", ranks.REPLAYED)[1]


def test_replayed_and_balanced_experts_learn_what_plain_does(
    sharded: tuple[list[dict[str, Any]], Path], plain: dict[str, Any]
) -> None:
    """Each process replays the routes of its share, half of which the other one sampled. The
    balance loss is another in other micro-batches; without it the difference is 0.05."""
    for rank in sharded[0]:
        found = rank["qwen3_moe"]
        for key, atol in (("before", 1e-5), ("after", 5e-3)):
            for ours, theirs in zip(found[key], plain[key], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=atol)
        for ours, theirs in zip(found["rows"], plain["rows"], strict=True):
            assert ours["router/replay_flips"] > 0 == ours["router/replay_absent"]
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
    norms = [[row["grad_norm"] for row in r["qwen3_moe"]["rows"]] for r in sharded[0]]
    assert norms[0] == norms[1]
    assert_complete([rank["qwen3_moe"]["source"] for rank in sharded[0]])


def assert_complete(sources: list[dict[str, Any]]) -> None:
    """The pieces of all ranks are the full tensors of each, every element once."""
    whole = from_shards(sources)
    for source in sources:
        assert whole.keys() == dict(source["tensors"]).keys()
        for name, tensor in source["tensors"]:
            assert torch.equal(whole[name], tensor), name


def test_frozen_routers_stay_and_are_sent_and_everything_else_learns(
    sharded: tuple[list[dict[str, Any]], Path],
) -> None:
    start = dict(named_tensors(ranks.model("glm4_moe")))
    sources = [rank["glm4_moe"]["source"] for rank in sharded[0]]
    assert_complete(sources)
    now = dict(sources[0]["tensors"])
    assert now.keys() == start.keys()
    for key, tensor in start.items():
        if is_sent_buffer(key):
            assert now[key].dtype == torch.float32 and torch.equal(now[key], tensor), key
            continue
        assert now[key].dtype == torch.bfloat16
        stays = ".mlp.gate." in key
        assert torch.equal(now[key], tensor.bfloat16()) == stays, key
    for rank in sharded[0]:
        assert all(row["grad_norm"] > 0 for row in rank["glm4_moe"]["rows"])
        assert np.array_equal(*rank["glm4_moe"]["resumed"])


def test_what_is_written_is_read_by_transformers_with_biases_in_float32(
    sharded: tuple[list[dict[str, Any]], Path],
) -> None:
    written = AutoModelForCausalLM.from_pretrained(sharded[1] / "model", dtype=torch.bfloat16)
    now = dict(sharded[0][0]["glm4_moe"]["source"]["tensors"])
    for key, tensor in named_tensors(written):
        assert torch.equal(now[key], tensor), key
    assert len(dict(sent_buffers(written))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_routers_of_the_plain_trainer_stay_and_everything_else_learns(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    trainer, found = alone("glm4_moe", ranks.FROZEN, dtype)
    frozen = {id(router.module.weight) for router in routers_of(trainer.model)}
    start = dict(ranks.model("glm4_moe").named_parameters())
    assert len(frozen) == 2
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, start[name].to(dtype)) == (id(parameter) in frozen), name
    assert "router/aux_loss" not in found["rows"][0]
    biases = {name: b.clone() for name, b in sent_buffers(trainer.model)}
    trainer.write_model(tmp_path, torch.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    assert len(biases) == 2
    assert all(torch.equal(written[name], bias) for name, bias in biases.items())


def test_a_balance_loss_evens_out_the_use_of_experts() -> None:
    """Alone: no reply has an advantage in the loss that is scaled away."""
    shelf, options = RouteShelf(), RoutingOptions(router_aux_coef=1.0)
    trainer = ranks.plain("qwen3_moe", options, shelf)
    given = ranks.batches("qwen3_moe", World(), shelf)
    losses = []
    for _ in range(15):
        metrics = TokenMetrics()
        trainer.accumulate(given[0], functools.partial(times, 1e-6), metrics)
        trainer.step(3e-3)
        losses.append(metrics.result()["router/aux_loss"])
    assert losses[-1] < losses[0] - 0.1 and losses[-1] >= 1.0
