"""The models that learn, of transformers. The policy has the engine's starting weights, a critic of
its own those of the policy, or of a language or reward model."""

from __future__ import annotations

import copy
import logging

import torch
from transformers import PreTrainedModel

from engine.errors import InvalidRequest
from recipes.actors.actor import Actor
from recipes.settings.options import PpoOptions, RunOptions
from recipes.trainers.base import Learner
from recipes.trainers.critic import Critic
from recipes.trainers.masters import dither, require_range
from recipes.trainers.plain import Trainer
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routing import Routing
from recipes.trainers.sharded import Backend, ShardedTrainer
from recipes.trainers.value_head import ValueHead
from recipes.world import World, uses_gpu
from rollout.launch import read_checkpoint
from rollout.offline import derive_seed
from trainer_bridge import load_causal_lm, load_classifier

logger = logging.getLogger(__name__)

LR_RATIO = 5.0
"""Learning rate of a critic over that of the policy, where none is given."""


def load_trainer(
    options: RunOptions,
    actor: Actor,
    world: World | None = None,
    shelf: RouteShelf | None = None,
) -> Learner:
    """The trainer that the options name, computing in the engine's dtype; collective.

    shelf: where the routes of replies are, where they are replayed. Raises InvalidRequest for
    several processes of a trainer of one, for a trainer whose library is missing, and for options
    of routers where there are none; CheckpointError for a weight that the dtype cannot hold.
    """
    world = world or World()
    if options.placement.trainer == "plain" and world.size > 1:
        raise InvalidRequest(
            f"trainer: plain is one process, and torchrun started {world.size}; add --trainer "
            "deepspeed or --trainer fsdp",
            field="trainer",
        )
    model = _read_model(options.model, options)
    needs = options.objective.kl_coef > 0 and options.objective.reference != "engine"
    reference = copy.deepcopy(model) if needs else None
    head = None
    if isinstance(options, PpoOptions) and options.value_function.critic == "shared":
        coef = options.value_function.value_coef
        head = _value_head(options, model, world, coef=coef, lr_ratio=critic_lr_ratio(options))
    routing = Routing(model, options.routing, shelf or RouteShelf(world=world))
    return _learner(options, actor, world, model, reference=reference, head=head, routing=routing)


def load_critic(options: RunOptions, actor: Actor, policy: Learner, world: World) -> Critic | None:
    """The critic of a run that has one; collective.

    policy: what `load_trainer` gave. Raises InvalidRequest for a file of another vocabulary.
    """
    if not isinstance(options, PpoOptions):
        return None
    given = options.value_function
    learner, own = policy, given.critic == "own"
    if own:
        model, weight = _read_critic(options)
        head = _value_head(options, model, world, coef=1.0, weight=weight)
        learner = _learner(options, actor, world, model, head=head)
    return Critic(
        learner,
        own=own,
        lr_ratio=critic_lr_ratio(options),
        warmup_steps=given.critic_warmup_steps,
        normalises=given.normalise_values,
    )


def critic_lr_ratio(options: PpoOptions) -> float:
    """The critic's learning rate over the policy's."""
    given = options.value_function.critic_lr
    return LR_RATIO if given is None else given / options.optimizer.lr


def _read_model(path: str, options: RunOptions) -> PreTrainedModel:
    checkpoint = read_checkpoint(path, options.load_format, options.seed)
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    assert isinstance(model, PreTrainedModel)
    return model


def _read_critic(options: PpoOptions) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """A critic's network, and what its values start from: float32 [1, H], the head of a reward
    model (as in Ouyang et al., arXiv 2203.02155), unless the critic learns deviations, which a
    score is none of; None is zero."""
    given = options.value_function
    if given.critic_model is None:
        return _read_model(options.model, options), None
    checkpoint = read_checkpoint(given.critic_model)
    if not checkpoint.num_labels:
        model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
        assert isinstance(model, PreTrainedModel)
        return model, None
    model = load_classifier(checkpoint.hf_config, checkpoint.tensors)
    assert isinstance(model, PreTrainedModel)
    return model, None if given.normalise_values else model.score.weight.detach().clone()


def _value_head(
    options: PpoOptions,
    model: PreTrainedModel,
    world: World,
    *,
    coef: float,
    lr_ratio: float = 1.0,
    weight: torch.Tensor | None = None,
) -> ValueHead:
    return ValueHead(
        model.config.get_text_config().hidden_size,
        options.optimizer,
        device=trainer_device(options, world),
        coef=coef,
        clip=options.value_function.value_clip,
        lr_ratio=lr_ratio,
        weight=weight,
        world=world,
    )


def _learner(
    options: RunOptions,
    actor: Actor,
    world: World,
    model: PreTrainedModel,
    *,
    reference: PreTrainedModel | None = None,
    head: ValueHead | None = None,
    routing: Routing | None = None,
) -> Learner:
    """The trainer of one model, its masters dithered where they are to be."""
    device, dtype = trainer_device(options, world), engine_dtype(actor)
    if dtype != torch.float32:
        require_range(((n, p.detach()) for n, p in model.named_parameters()), dtype)
    if options.optimizer.dither == "on" and dtype != torch.float32:
        _dither(model, dtype, derive_seed(options.seed, "dither"))
    temperature = options.rollout.temperature
    if options.placement.trainer == "plain":
        return Trainer(
            model,
            options.optimizer,
            device=device,
            dtype=dtype,
            temperature=temperature,
            reference=reference,
            reference_on_host=options.objective.reference == "host",
            head=head,
            routing=routing,
        )
    backend = _backend(options, model, reference, world, device, dtype)
    return ShardedTrainer(
        backend, options.optimizer, world, temperature=temperature, head=head, routing=routing
    )


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
