"""What the trainers do on each rank; run by `rank_processes`, or in the test itself for one."""

from __future__ import annotations

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
from recipes.types import Batch
from recipes.world import World
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.trajectories import random_batch

VOCAB, STEPS, TEMPERATURE = 20, 3, 0.7
CPU = torch.device("cpu")
LOSS = functools.partial(policy_loss, algorithm=preset("grpo", 8))
# A few tree nodes only, so that ranks have several micro-batches, and not equally many.
OPTIONS = OptimizerOptions(lr=1e-2, max_tokens_per_microbatch=14)
Results = dict[str, Any]


def model() -> Any:
    return tiny_hf("llama", vocab_size=VOCAB, hidden_size=32, head_dim=8)


def batch(step: int) -> Batch:
    """Another batch each step; in the last, only one sequence has an advantage."""
    drawn = random_batch(3, 3, vocab=VOCAB, seed=step)
    if step == STEPS - 1:
        for advantages in drawn.advantages[1:]:
            advantages[:] = 0
    return drawn


def plain(*, on_host: bool = False, device: torch.device = CPU) -> Trainer:
    return Trainer(
        model(),
        OPTIONS,
        device=device,
        dtype=torch.float32,
        temperature=TEMPERATURE,
        reference=model(),
        reference_on_host=on_host,
    )


def deepspeed(
    world: World,
    stage: int,
    dtype: torch.dtype = torch.float32,
    *,
    checkpointing: bool = False,
    on_host: bool = False,
    device: torch.device = CPU,
) -> ShardedTrainer:
    from recipes.trainers.deepspeed import DeepSpeedBackend

    options = OptimizerOptions(
        lr=1e-2, max_tokens_per_microbatch=14, gradient_checkpointing=checkpointing
    )
    backend = DeepSpeedBackend(
        model(),
        options,
        stage=stage,
        device=device,
        dtype=dtype,
        reference=model(),
        reference_on_host=on_host,
    )
    return ShardedTrainer(backend, options, world, temperature=TEMPERATURE)


def fsdp(
    world: World,
    dtype: torch.dtype = torch.float32,
    *,
    on_host: bool = False,
    device: torch.device = CPU,
) -> ShardedTrainer:
    from recipes.trainers.fsdp import FsdpBackend

    backend = FsdpBackend(
        model(),
        OPTIONS,
        num_processes=world.size,
        device=device,
        dtype=dtype,
        reference=model(),
        reference_on_host=on_host,
    )
    return ShardedTrainer(backend, OPTIONS, world, temperature=TEMPERATURE)


def learn(trainer: Learner, world: World, first: int = 0) -> list[dict[str, float]]:
    """Steps from `first` on; the merged figures of each."""
    rows = []
    for step in range(first, STEPS):
        metrics = TokenMetrics()
        assert trainer.accumulate(batch(step), LOSS, metrics)
        norm = trainer.step(1e-2 / (step + 1))
        rows.append({**merge(world.gather([metrics])).result(), "grad_norm": norm})
    return rows


def figures(trainer: Learner, world: World) -> Results:
    """What a run sees of a trainer over a few steps."""
    trajectories = batch(0).trajectories
    before = trainer.logprobs(trajectories)
    return {
        "before": before,
        "rows": learn(trainer, world),
        "after": trainer.logprobs(trajectories),
        "reference": trainer.reference_logprobs(trajectories),
    }


def no_gradient(trainer: Learner) -> bool:
    """What a batch without any advantage gives."""
    drawn = batch(0)
    for advantages in drawn.advantages:
        advantages[:] = 0
    return trainer.accumulate(drawn, LOSS, TokenMetrics())


def deepspeed_alone(rank: int, size: int, folder: Path) -> Results:
    """What is compared of one process."""
    world = World(rank=rank, size=size, rollout_ranks=size)
    return {
        f"zero{stage}": figures(
            deepspeed(world, stage, checkpointing=stage == 2, on_host=stage > 0), world
        )
        for stage in range(4)
    }


def deepspeed_ranks(rank: int, size: int, folder: Path) -> Results:
    world = World(rank=rank, size=size, rollout_ranks=size)
    results: Results = {}
    for stage in (0, 1, 2, 3):
        trainer = deepspeed(world, stage, checkpointing=stage == 2)
        results[f"zero{stage}"] = figures(trainer, world)
        rounded = deepspeed(world, stage, torch.bfloat16)
        results[f"zero{stage}-masters"] = start_of_masters(rounded)
        results[f"zero{stage}-bfloat16"] = figures(rounded, world)
    results["no gradient"] = no_gradient(trainer)
    trainer.write_model(folder / "model", torch.float32)
    results["resumed"] = resumed(
        functools.partial(deepspeed, world, 3), world, folder / "checkpoint"
    )
    return results


def start_of_masters(trainer: ShardedTrainer) -> Results:
    """DeepSpeed's float32 masters, before any step, and what the module computes with."""
    from deepspeed.utils import safe_get_full_fp32_param

    module = trainer._backend.model.module  # type: ignore[attr-defined]
    return {
        name: (safe_get_full_fp32_param(parameter).cpu(), str(parameter.dtype))
        for name, parameter in module.named_parameters()
    }


def fsdp_ranks(rank: int, size: int, folder: Path) -> Results:
    world = World(rank=rank, size=size, rollout_ranks=size)
    trainer = fsdp(world)
    results = {"fsdp": figures(trainer, world), "no gradient": no_gradient(trainer)}
    trainer.write_model(folder / "model", torch.float32)
    results["resumed"] = resumed(functools.partial(fsdp, world), world, folder / "checkpoint")
    results["fsdp-bfloat16"] = figures(fsdp(world, torch.bfloat16), world)
    return results


def fsdp_alone(rank: int, size: int, folder: Path) -> Results:
    """What is compared of one process, which also goes on from the checkpoint that two processes
    wrote beside this folder."""
    world = World(rank=rank, size=size, rollout_ranks=size)
    results: Results = {"fsdp": figures(fsdp(world), world)}
    trainer = fsdp(world)
    trainer.load(folder.parent / "fsdp2" / "checkpoint")
    learn(trainer, world, STEPS - 1)
    results["after two"] = np.concatenate(trainer.logprobs(batch(0).trajectories))
    return results


def resumed(build: Any, world: World, folder: Path) -> Results:
    """The rows of a run that was saved after two steps, and of one that loaded that."""
    folder.mkdir(exist_ok=True)
    first = build()
    for step in range(STEPS - 1):
        first.accumulate(batch(step), LOSS, TokenMetrics())
        first.step(1e-2 / (step + 1))
    first.save(folder)
    world.barrier()
    second = build()
    second.load(folder)
    rows = [learn(trainer, world, STEPS - 1) for trainer in (first, second)]
    logprobs = [np.concatenate(t.logprobs(batch(0).trajectories)) for t in (first, second)]
    return {"rows": rows, "logprobs": logprobs}
