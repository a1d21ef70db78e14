"""A trainer that replays an engine's routes computes what the engine did."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from engine.errors import InvalidRequest
from engine.protocol import RouteArray
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routers import routers_of
from recipes.trainers.routing import Routing
from recipes.trainers.routing_options import RoutingOptions
from recipes.types import Batch
from tests.helpers.expert_families import FAMILIES, tiny_experts
from tests.helpers.expert_routes import perturbed, routes_of, with_routes
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.trainer_ranks import LOSS, times
from tests.helpers.trajectories import random_batch
from tests.recipes.trainers.test_plain import plain_gradient, plain_logprobs

CPU = torch.device("cpu")


def trainer_of(model: Any, shelf: RouteShelf, *, replay: bool = True, **options: Any) -> Trainer:
    routing = Routing(model, RoutingOptions(routing_replay=replay), shelf)
    return Trainer(
        model,
        OptimizerOptions(**options),
        device=CPU,
        dtype=torch.float32,
        temperature=0.7,
        routing=routing,
    )


def routed_batch(engine: Any, shelf: RouteShelf, seed: int = 0) -> Batch:
    batch = random_batch(3, 3, vocab=100, seed=seed)
    routes = routes_of(engine, batch.trajectories)
    return dataclasses.replace(batch, trajectories=with_routes(batch.trajectories, routes, shelf))


def worst(trainer: Trainer, batch: Batch, wanted: list[torch.Tensor]) -> float:
    found = trainer.logprobs(batch.trajectories)
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_routes_give_the_log_probabilities_of_the_model_that_chose_them(
    family: str,
) -> None:
    model, shelf = tiny_experts(family), RouteShelf()
    engine = perturbed(model)
    batch = routed_batch(engine, shelf)
    with torch.no_grad():
        wanted = plain_logprobs(engine, batch)
    assert worst(trainer_of(model, shelf), batch, wanted) < 1e-5
    alone = trainer_of(tiny_experts(family), shelf, replay=False)
    assert worst(alone, batch, wanted) > 1e-2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_replayed_routes_give_the_gradient_too_that_of_routers_included(
    family: str, recompute: bool
) -> None:
    """Recomputed layers ask for the routes a second time."""
    model, shelf = tiny_experts(family), RouteShelf()
    engine = perturbed(model)
    batch = routed_batch(engine, shelf)
    wanted = plain_gradient(engine, batch)
    trainer = trainer_of(model, shelf, gradient_checkpointing=recompute)
    assert trainer.accumulate(batch, LOSS, TokenMetrics())
    named = dict(model.named_parameters())
    for (name, parameter), want in zip(named.items(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, atol=1e-5, rtol=1e-4, msg=name)
    routers = [router.module.weight for router in routers_of(model)]
    assert all(weight.grad is not None and weight.grad.abs().max() > 1e-5 for weight in routers)


def without(routes: list[RouteArray]) -> list[RouteArray]:
    """Every other position has no route in layer 2."""
    for array in routes:
        array[::2, 2] = 255
    return routes


def test_flips_and_absent_routes_are_counted_once_a_token() -> None:
    model, shelf = tiny_experts("qwen3_moe"), RouteShelf()
    engine = perturbed(model)
    # One sequence: nothing is shared, so that positions are nodes.
    batch = random_batch(1, 1, vocab=100)
    [routes] = without(routes_of(engine, batch.trajectories))
    trajectories = with_routes(batch.trajectories, [routes], shelf)
    batch = dataclasses.replace(batch, trajectories=trajectories)
    trainer, metrics = trainer_of(model, shelf, gradient_checkpointing=True), TokenMetrics()
    trainer.accumulate(batch, LOSS, metrics)
    counts = metrics.routing
    assert counts is not None and trainer.routing is not None
    num = len(routes)
    assert counts.absent == (num + 1) // 2
    assert counts.replayed == 2 * num - counts.absent
    assert counts.load.shape == (2, 8) and counts.load.sum() == 2 * 2 * num
    assert 0 < counts.flips < counts.replayed
    figures = metrics.result()
    assert figures["router/replay_flips"] == counts.flips / counts.replayed
    assert figures["router/replay_absent"] == counts.absent / (2 * num)
    # A model's own routes are no flips.
    own = routes_of(tiny_experts("qwen3_moe"), batch.trajectories)
    batch = dataclasses.replace(batch, trajectories=with_routes(batch.trajectories, own, shelf))
    metrics = TokenMetrics()
    trainer_of(tiny_experts("qwen3_moe"), shelf).accumulate(batch, LOSS, metrics)
    assert metrics.routing is not None and metrics.routing.flips == 0 == metrics.routing.absent


def test_tokens_without_a_route_go_where_the_router_sends_them() -> None:
    model, shelf = tiny_experts("mixtral"), RouteShelf()
    batch = random_batch(2, 2, vocab=100)
    routes = [np.full_like(array, 255) for array in routes_of(model, batch.trajectories)]
    with torch.no_grad():
        wanted = plain_logprobs(model, batch)
    absent = with_routes(batch.trajectories, routes, shelf)
    batch = dataclasses.replace(batch, trajectories=absent)
    assert worst(trainer_of(model, shelf), batch, wanted) < 1e-5


@pytest.mark.parametrize(
    "change,told",
    [
        (lambda routes: routes[:-1], "positions"),
        (lambda routes: routes[:, :-1], "2 layers"),
        (lambda routes: routes[..., :1], "1 experts a token"),
        (lambda routes: np.where(routes == 7, np.uint8(8), routes), "name expert 8"),
    ],
)
def test_routes_of_another_model_are_refused(change: Any, told: str) -> None:
    model, shelf = tiny_experts("qwen3_moe"), RouteShelf()
    batch = random_batch(2, 2, vocab=100)
    routes = [np.ascontiguousarray(change(r)) for r in routes_of(model, batch.trajectories)]
    routed = with_routes(batch.trajectories, routes, shelf)
    with pytest.raises(InvalidRequest, match=told) as refusal:
        trainer_of(model, shelf).logprobs(routed)
    assert refusal.value.field == "routed_experts"


@pytest.mark.parametrize("name", ["routing_replay", "freeze_router", "router_aux_coef"])
def test_a_dense_model_is_refused_by_name(name: str) -> None:
    options = RoutingOptions(**{name: 0.1 if name == "router_aux_coef" else True})
    with pytest.raises(InvalidRequest, match=f"--{name.replace('_', '-')}") as refusal:
        Routing(tiny_hf("llama"), options, RouteShelf())
    assert refusal.value.field == name
    assert Routing(tiny_hf("llama"), RoutingOptions(), RouteShelf()).counts() is None


@pytest.mark.parametrize("recompute", [False, True])
def test_the_balance_loss_is_that_of_transformers_and_has_its_gradient(recompute: bool) -> None:
    """transformers counts each of a token's K choices as a whole one, and all layers as one."""
    batch = random_batch(1, 1, vocab=100)
    [t] = batch.trajectories
    ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long()[:-1]
    reference = tiny_experts("qwen3_moe")
    logits = reference(ids[None], output_router_logits=True).router_logits
    want = torch.stack([load_balancing_loss_func((each,), 8, 2) / 2 for each in logits]).mean()
    want.backward()
    model, metrics = tiny_experts("qwen3_moe"), TokenMetrics()
    trainer = Trainer(
        model,
        OptimizerOptions(gradient_checkpointing=recompute),
        device=CPU,
        dtype=torch.float32,
        temperature=0.7,
        routing=Routing(model, RoutingOptions(router_aux_coef=100.0), RouteShelf()),
    )
    trainer.accumulate(batch, functools.partial(times, 0.0), metrics)
    assert metrics.result()["router/aux_loss"] == pytest.approx(float(want.detach()))
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected = wanted[name].grad
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / 100
        expected = torch.zeros_like(parameter) if expected is None else expected
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4, msg=name)
