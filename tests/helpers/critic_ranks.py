"""What trainers with a critic do on each rank; run by `rank_processes`, or in the test itself."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.algorithms.losses import policy_loss
from recipes.algorithms.presets import preset
from recipes.trainers.base import Learner
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.trainers.sharded import ShardedTrainer
from recipes.trainers.value_head import ValueHead
from recipes.types import Batch
from recipes.world import World
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.trajectories import per_token, random_batch

VOCAB, HIDDEN, STEPS, TEMPERATURE = 20, 32, 4, 0.7
COEF, CLIP, LR = 0.5, 0.2, 1e-2
CPU, ALONE = torch.device("cpu"), World()
LOSS = functools.partial(policy_loss, algorithm=preset("grpo", 8))
Results = dict[str, Any]


def model(arch: str = "llama") -> Any:
    return tiny_hf(arch, vocab_size=VOCAB, hidden_size=HIDDEN, head_dim=8)


def reward_model(arch: str = "llama") -> Any:
    """A sequence classifier of one label, which a critic may start from."""
    return tiny_hf(
        arch, classifier=True, num_labels=1, vocab_size=VOCAB, hidden_size=HIDDEN, head_dim=8
    )


def options(budget: int = 14) -> OptimizerOptions:
    """A few tree nodes only, so that ranks have several micro-batches, and not equally many."""
    return OptimizerOptions(lr=LR, max_tokens_per_microbatch=budget)


def head(world: World, on: Any = None) -> ValueHead:
    """Of a trainer on the model `on`, whose head it starts from if that is a classifier."""
    return ValueHead(
        HIDDEN,
        options(),
        device=CPU,
        coef=COEF,
        clip=CLIP,
        lr_ratio=2.0,
        weight=on.score.weight.detach().clone() if hasattr(on, "score") else None,
        world=world,
    )


def batch(step: int) -> Batch:
    """Another batch each step, its values and returns drawn; in the last, only one sequence."""
    drawn = random_batch(3, 3, vocab=VOCAB, seed=step)
    if step == STEPS - 1:
        drawn = drawn.select([4])
    rng = np.random.default_rng(step)
    old, returns = (
        rng.standard_normal(len(drawn.trajectories)).astype(np.float32) for _ in range(2)
    )
    return dataclasses.replace(
        drawn,
        values=per_token(drawn.trajectories, 0.1 * old),
        returns=per_token(drawn.trajectories, returns),
    )


def plain(own: Any = None, *, budget: int = 14) -> Trainer:
    return Trainer(
        model() if own is None else own,
        options(budget),
        device=CPU,
        dtype=torch.float32,
        temperature=TEMPERATURE,
        head=head(ALONE, own),
    )


def deepspeed(
    world: World,
    stage: int,
    dtype: torch.dtype = torch.float32,
    *,
    own: Any = None,
    checkpointing: bool = False,
) -> ShardedTrainer:
    from recipes.trainers.deepspeed import DeepSpeedBackend

    given = dataclasses.replace(options(), gradient_checkpointing=checkpointing)
    value_head, learner = head(world, own), model() if own is None else own
    backend = DeepSpeedBackend(learner, given, stage=stage, device=CPU, dtype=dtype)
    return ShardedTrainer(backend, given, world, temperature=TEMPERATURE, head=value_head)


def fsdp(world: World, dtype: torch.dtype = torch.float32, *, own: Any = None) -> ShardedTrainer:
    from recipes.trainers.fsdp import FsdpBackend

    value_head, learner = head(world, own), model() if own is None else own
    backend = FsdpBackend(learner, options(), num_processes=world.size, device=CPU, dtype=dtype)
    return ShardedTrainer(backend, options(), world, temperature=TEMPERATURE, head=value_head)


def learn(
    trainer: Learner, world: World, *, first: int = 0, last: int = STEPS, own: bool = False
) -> list[dict[str, float]]:
    """The figures of each step: the head alone in the first, policy and values in the others; or
    the values alone in all of them, as a critic of its own network learns."""
    rows = []
    for step in range(first, last):
        metrics = TokenMetrics()
        if own or step == 0:
            trainer.accumulate_values(batch(step), metrics, trunk=own)
            norm = trainer.step(LR) if own else trainer.step_head(LR)
        else:
            assert trainer.accumulate(batch(step), LOSS, metrics)
            norm = trainer.step(LR / (step + 1))
        rows.append({**merge(world.gather([metrics])).result(), "grad_norm": norm})
    return rows


def figures(trainer: Learner, world: World, *, own: bool = False) -> Results:
    """What a run sees of a trainer over a few steps."""
    rows = learn(trainer, world, own=own)
    value_head = trainer.head if isinstance(trainer, Trainer) else trainer._head  # type: ignore[attr-defined]
    trajectories = batch(0).trajectories
    return {
        "rows": rows,
        "values": trainer.values(trajectories),
        "logprobs": trainer.logprobs(trajectories),
        "head": [p.detach().numpy() for p in value_head.linear.parameters()],
    }


def scored(trainer: Learner, world: World) -> Results:
    """What a run sees of a critic that started from a reward model: it has no logprobs."""
    trajectories = batch(0).trajectories
    before = trainer.values(trajectories)
    rows = learn(trainer, world, own=True)
    return {"rows": rows, "before": before, "values": trainer.values(trajectories)}


def resumed(build: Any, world: World, folder: Path) -> Results:
    """The rows of a run that was saved after three steps, and of one that loaded that."""
    folder.mkdir(exist_ok=True)
    first = build()
    learn(first, world, last=STEPS - 1)
    first.save(folder)
    world.barrier()
    second = build()
    second.load(folder)
    rows = [learn(trainer, world, first=STEPS - 1) for trainer in (first, second)]
    values = [np.concatenate(t.values(batch(0).trajectories)) for t in (first, second)]
    return {"rows": rows, "values": values}


def deepspeed_ranks(rank: int, size: int, folder: Path) -> Results:
    world = World(rank=rank, size=size, rollout_ranks=size)
    results: Results = {}
    for stage in range(4):
        build = functools.partial(deepspeed, world, stage, checkpointing=stage == 2)
        results[f"zero{stage}"] = figures(build(), world)
        results[f"zero{stage}-own"] = figures(build(), world, own=True)
        results[f"zero{stage}-scored"] = scored(build(own=reward_model()), world)
        if size > 1:
            rounded = deepspeed(world, stage, torch.bfloat16)
            results[f"zero{stage}-bfloat16"] = figures(rounded, world)
    results["resumed"] = resumed(
        functools.partial(deepspeed, world, 3), world, folder / "checkpoint"
    )
    return results


def fsdp_ranks(rank: int, size: int, folder: Path) -> Results:
    world = World(rank=rank, size=size, rollout_ranks=size)
    return {
        "fsdp": figures(fsdp(world), world),
        "fsdp-own": figures(fsdp(world), world, own=True),
        "fsdp-scored": scored(fsdp(world, own=reward_model()), world),
        "fsdp-bfloat16": figures(fsdp(world, torch.bfloat16), world),
        "resumed": resumed(functools.partial(fsdp, world), world, folder / "checkpoint"),
    }
