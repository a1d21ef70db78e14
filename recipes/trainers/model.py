"""The model that learns: a transformers causal LM with the engine's starting weights."""

from __future__ import annotations

import copy
import logging

import torch
from transformers import PreTrainedModel

from engine.errors import InvalidRequest
from recipes.actors.actor import Actor
from recipes.settings.options import RunOptions
from recipes.trainers.base import Learner
from recipes.trainers.masters import dither, require_range
from recipes.trainers.plain import Trainer
from recipes.trainers.sharded import Backend, ShardedTrainer
from recipes.world import World, uses_gpu
from rollout.launch import read_checkpoint
from rollout.offline import derive_seed
from trainer_bridge import load_causal_lm

logger = logging.getLogger(__name__)


def load_trainer(options: RunOptions, actor: Actor, world: World | None = None) -> Learner:
    """The trainer that the options name, computing in the engine's dtype; collective.

    Raises InvalidRequest for several processes of a trainer of one, and for a trainer whose
    library is missing; CheckpointError for a weight that the dtype cannot hold.
    """
    world = world or World()
    name = options.placement.trainer
    if name == "plain" and world.size > 1:
        raise InvalidRequest(
            f"trainer: plain is one process, and torchrun started {world.size}; add --trainer "
            "deepspeed or --trainer fsdp",
            field="trainer",
        )
    checkpoint = read_checkpoint(options.model, options.load_format, options.seed)
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    assert isinstance(model, PreTrainedModel)
    device, dtype = trainer_device(options, world), engine_dtype(actor)
    if dtype != torch.float32:
        require_range(((n, p.detach()) for n, p in model.named_parameters()), dtype)
    on_host = options.objective.reference == "host"
    needs = options.objective.kl_coef > 0 and options.objective.reference != "engine"
    reference = copy.deepcopy(model) if needs else None
    if options.optimizer.dither == "on" and dtype != torch.float32:
        _dither(model, dtype, derive_seed(options.seed, "dither"))
    temperature = options.rollout.temperature
    if name == "plain":
        return Trainer(
            model,
            options.optimizer,
            device=device,
            dtype=dtype,
            temperature=temperature,
            reference=reference,
            reference_on_host=on_host,
        )
    backend = _backend(options, model, reference, world, device, dtype)
    return ShardedTrainer(backend, options.optimizer, world, temperature=temperature)


def trainer_device(options: RunOptions, world: World) -> torch.device:
    """Where this process trains."""
    if uses_gpu(options.device):
        return torch.device("cuda", world.local_rank)
    return torch.device("cpu")


def engine_dtype(actor: Actor) -> torch.dtype:
    """The dtype the engine serves in."""
    dtype = getattr(torch, actor.state().dtype.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _dither(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> None:
    """Start the masters of a checkpoint in `dtype` inside its rounding cells; what the engine
    serves stays the same to the bit, and the reference is the checkpoint itself."""
    moved = dither(((n, p.detach()) for n, p in model.named_parameters()), dtype, seed=seed)
    if moved:
        logger.info("%d tensors lie on the %s grid: masters are dithered", len(moved), dtype)


def _backend(
    options: RunOptions,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
) -> Backend:
    on_host = options.objective.reference == "host"
    if options.placement.trainer == "fsdp":
        from recipes.trainers.fsdp import FsdpBackend

        return FsdpBackend(
            model,
            options.optimizer,
            num_processes=world.size,
            device=device,
            dtype=dtype,
            reference=reference,
            reference_on_host=on_host,
        )
    from recipes.trainers.deepspeed import DeepSpeedBackend

    stage = options.placement.zero
    return DeepSpeedBackend(
        model,
        options.optimizer,
        stage=2 if stage is None else stage,
        device=device,
        dtype=dtype,
        reference=reference,
        reference_on_host=on_host,
    )
