"""What each rank sees of a mixture of experts that is sharded, or trained; run by
`rank_processes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from recipes.trainers.base import Learner
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routing import Routing
from recipes.trainers.routing_options import RoutingOptions
from recipes.trainers.sharded import Backend, ShardedTrainer
from recipes.types import Batch
from recipes.world import World
from tests.helpers.expert_families import WITH_BIAS, tiny_experts
from tests.helpers.expert_routes import perturbed, routes_of
from tests.helpers.source_ranks import Results, seen
from tests.helpers.trainer_ranks import LOSS
from tests.helpers.trajectories import random_batch
from trainer_bridge.adapters.fitting import source_of

EXPERTS = 7
"""In no equal parts of two."""
STEPS = 2
CPU = torch.device("cpu")
# A few tree nodes only, so that ranks have several micro-batches, and not equally many.
OPTIONS = OptimizerOptions(lr=1e-2, max_tokens_per_microbatch=14, gradient_checkpointing=True)
REPLAYED = RoutingOptions(routing_replay=True, router_aux_coef=0.05)
FROZEN = RoutingOptions(freeze_router=True)


def model(family: str) -> Any:
    return tiny_experts(family, experts=EXPERTS)


def expert_sources(rank: int, size: int, folder: Path) -> Results:
    """By family, the sources of ZeRO-3 and FSDP2."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    mesh = init_device_mesh("cpu", (size,))
    results: Results = {}
    for family in WITH_BIAS:
        sharded = model(family)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        results[f"fsdp {family}"] = seen(source_of(fully_shard(sharded, mesh=mesh)))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        }
        engine, *_ = deepspeed.initialize(model=model(family), config=config)
        results[f"zero3 {family}"] = seen(source_of(engine, dtype=torch.bfloat16))
    return results


def batches(family: str, world: World, shelf: RouteShelf) -> list[Batch]:
    """The same in all processes; each keeps the routes of every other reply."""
    engine, found = perturbed(model(family)), []
    for step in range(STEPS):
        batch = random_batch(3, 3, vocab=100, seed=step)
        routes = routes_of(engine, batch.trajectories)
        mine = range(world.rank, len(routes), world.size)
        held = dict(world.gather([(index, shelf.put(routes[index])) for index in mine]))
        trajectories = tuple(
            dataclasses.replace(t, routes=held[index]) for index, t in enumerate(batch.trajectories)
        )
        found.append(dataclasses.replace(batch, trajectories=trajectories))
    return found


def plain(
    family: str,
    options: RoutingOptions,
    shelf: RouteShelf,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    made = model(family)
    routing = Routing(made, options, shelf)
    return Trainer(made, OPTIONS, device=CPU, dtype=dtype, temperature=0.7, routing=routing)


def learnt(trainer: Learner, given: list[Batch], world: World) -> Results:
    """Log-probabilities before and after a few steps, and the figures of each."""
    before, rows = trainer.logprobs(given[0].trajectories), []
    for batch in given:
        metrics = TokenMetrics()
        assert trainer.accumulate(batch, LOSS, metrics)
        norm = trainer.step(1e-2)
        rows.append({**merge(world.gather([metrics])).result(), "grad_norm": norm})
    after = trainer.logprobs(given[0].trajectories)
    return {"before": before, "rows": rows, "after": after}


def expert_trainers(name: str, rank: int, size: int, folder: Path) -> Results:
    """Of one back end: with routes replayed and a balance loss, and in bfloat16 with routers
    frozen, which is also saved and loaded."""
    world = World(rank=rank, size=size, rollout_ranks=size)
    shelf = RouteShelf(world=world)
    replayed = sharded(name, world, shelf, "qwen3_moe", REPLAYED, torch.float32)
    results = {"qwen3_moe": learnt(replayed, batches("qwen3_moe", world, shelf), world)}
    results["qwen3_moe"]["source"] = seen(replayed.weights)

    def frozen() -> ShardedTrainer:
        return sharded(name, world, shelf, "glm4_moe", FROZEN, torch.bfloat16)

    trainer, given = frozen(), batches("glm4_moe", world, shelf)
    found = results["glm4_moe"] = learnt(trainer, given, world)
    found["source"] = seen(trainer.weights)
    trainer.write_model(folder / "model", torch.bfloat16)
    found["resumed"] = resumed(trainer, frozen, given[0], world, folder / "saved")
    return results


def sharded(
    name: str,
    world: World,
    shelf: RouteShelf,
    family: str,
    routers: RoutingOptions,
    dtype: torch.dtype,
) -> ShardedTrainer:
    """A trainer of the back end "zero1", "zero3" or "fsdp"."""
    made = model(family)
    routing = Routing(made, routers, shelf)
    backend: Backend
    if name == "fsdp":
        from recipes.trainers.fsdp import FsdpBackend

        backend = FsdpBackend(made, OPTIONS, num_processes=world.size, device=CPU, dtype=dtype)
    else:
        from recipes.trainers.deepspeed import DeepSpeedBackend

        stage = int(name.removeprefix("zero"))
        backend = DeepSpeedBackend(made, OPTIONS, stage=stage, device=CPU, dtype=dtype)
    return ShardedTrainer(backend, OPTIONS, world, temperature=0.7, routing=routing)


def resumed(
    trainer: Learner, made: Callable[[], Learner], batch: Batch, world: World, folder: Path
) -> list[Any]:
    """Log-probabilities of a trainer a step further, and of one that loaded it before that."""
    folder.mkdir(exist_ok=True)
    trainer.save(folder)
    world.barrier()
    other = made()
    other.load(folder)
    for each in (trainer, other):
        each.accumulate(batch, LOSS, TokenMetrics())
        each.step(1e-2)
    return [np.concatenate(each.logprobs(batch.trajectories)) for each in (trainer, other)]
