"""The engines of a run: one in every trainer process, or some on GPUs of their own."""

from __future__ import annotations

import importlib.util

import torch

from engine.config import (
    CacheConfig,
    EngineConfig,
    MemoryConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from engine.errors import InvalidRequest
from recipes.actors.actor import Actor, InlineActor
from recipes.actors.endpoints import open_endpoints, open_fleet
from recipes.actors.engines import Engines, ReplicaEngines
from recipes.actors.fleet import FleetActor
from recipes.actors.on_ray import open_on_ray
from recipes.actors.scorer import ScoringEngine, scoring_config
from recipes.settings.options import RunOptions
from recipes.world import World, uses_gpu
from rollout.launch import launch
from rollout.replica.base import Replica

MOST_RUNNING = 1024
"""Sequences of one engine that run at once, at most."""


def launch_actor(options: RunOptions, world: World | None = None) -> Actor:
    """Start this process's engine, or, with `rollout_gpus`, those that the main process
    speaks with, or, with `endpoint`, speak with those that are there; collective. Raises
    InvalidRequest when there are too few GPUs; what `open_endpoints` raises."""
    world = world or World()
    if options.endpoints.endpoint:
        return open_fleet(open_endpoints, options, world, device=_device(options, world))
    if options.endpoints.launch == "ray":
        return open_fleet(open_on_ray, options, world, device=_device(options, world))
    num_engines = options.placement.rollout_gpus
    if num_engines == 0:
        sleeps = _sleeps(options)
        config = engine_config(options, gpu=world.local_rank, saver=sleeps)
        return InlineActor(launch(config), sleeps=sleeps)
    on_gpu = uses_gpu(options.device)
    first = _first_rollout_gpu(num_engines, world.size) if on_gpu else 0

    def launch_place(place: int) -> Replica:
        config = engine_config(options, gpu=first + place if on_gpu else 0)
        return launch(config, process=True)

    engines: Engines | None = None
    if world.is_main:
        replicas = [launch_place(place) for place in range(num_engines)]
        engines = ReplicaEngines(replicas, launch_place)
    return FleetActor(engines, world, device=_device(options, world))


def has_own_engine(options: RunOptions) -> bool:
    """Whether every trainer process rolls out too, with an engine of its own."""
    return options.placement.rollout_gpus == 0 and not options.endpoints.endpoint


def needs_first_push(options: RunOptions) -> bool:
    """Whether the engines may have other weights, or other versions, than a run begins with."""
    return bool(options.endpoints.endpoint) or options.endpoints.launch == "ray"


def _device(options: RunOptions, world: World) -> torch.device:
    """Where the tensors of this process's trainer are."""
    on_gpu = uses_gpu(options.device)
    return torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")


def launch_reference(options: RunOptions, world: World | None = None) -> ScoringEngine | None:
    """Start the engine that serves the initial weights, if the options want one for the KL;
    collective. It shares the GPU of the main trainer process. Errors as of `ScoringEngine`."""
    if options.objective.kl_coef == 0 or options.objective.reference != "engine":
        return None
    config = scoring_config(
        options,
        options.model,
        load_format=options.load_format,
        kv_memory_gb=options.rollout.kv_memory_gb,
    )
    temperature = options.rollout.temperature
    return ScoringEngine(config, world, option="reference", temperature=temperature)


def engine_config(options: RunOptions, *, gpu: int = 0, saver: bool = False) -> EngineConfig:
    """The engine that the options name. gpu: the one it runs on, where it runs on one."""
    return EngineConfig(
        model=options.model,
        load_format=options.load_format,
        device=options.device,
        dtype=options.dtype,
        quantization=options.rollout.rollout_quantization,
        return_routed_experts=options.routing.routing_replay,
        seed=options.seed,
        cache=CacheConfig(memory_bytes=int(options.rollout.kv_memory_gb * 2**30)),
        scheduler=SchedulerConfig(max_running=_max_running(options)),
        parallel=ParallelConfig(base_gpu=gpu),
        memory=MemoryConfig(
            saver=saver,
            trainer_training_bytes=int(options.placement.trainer_memory_gb * 2**30),
        ),
        # By counts, never by the clock: a seed repeats a run, its times aside.
        speculative=SpeculativeConfig(
            method=options.rollout.speculative,
            draft_tokens=options.rollout.draft_tokens,
            pace="counts",
        ),
    )


def _max_running(options: RunOptions) -> int:
    """A step's samples at once, and those that are started ahead, where that is reasonable: waves
    of fewer would leave the last one half empty."""
    wanted = options.rollout.prompts_per_step * options.rollout.samples
    if options.asynchrony.asynchronous:
        wanted *= 1 + options.asynchrony.max_staleness
    return min(max(wanted, SchedulerConfig().max_running), MOST_RUNNING)


def _sleeps(options: RunOptions) -> bool:
    asked = options.placement.sleep
    if asked is not None:
        return asked
    if options.asynchrony.asynchronous:
        return False
    return uses_gpu(options.device) and importlib.util.find_spec("torch_memory_saver") is not None


def _first_rollout_gpu(num_engines: int, num_trainers: int) -> int:
    num_gpus = torch.cuda.device_count()
    if num_engines + num_trainers > num_gpus:
        raise InvalidRequest(
            f"rollout_gpus: {num_engines} GPUs for rollouts and {num_trainers} for training are "
            f"more than the {num_gpus} there are; lower --rollout-gpus or --nproc-per-node",
            field="rollout_gpus",
        )
    return num_gpus - num_engines
