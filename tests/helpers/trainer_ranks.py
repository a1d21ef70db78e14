"""What the trainers do on each rank; run by `rank_processes`, or in the test itself for one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from recipes.algorithms.losses import LossInputs, LossOutput, policy_loss
from recipes.algorithms.presets import preset
from recipes.trainers.base import Learner, Loss
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


def small_loss(inputs: LossInputs) -> LossOutput:
    """The loss, made small: gradients of such a model would overflow from float16's first scale
    on, as those of a real one do not."""
    return times(2.0**-10, inputs)


def overflowing_loss(inputs: LossInputs) -> LossOutput:
    """Its gradient is infinite in float16, and finite in float32."""
    return times(1e8, inputs)


def times(factor: float, inputs: LossInputs) -> LossOutput:
    output = LOSS(inputs)
    return dataclasses.replace(output, loss=output.loss * factor)


def plain(
    dtype: torch.dtype = torch.float32, *, on_host: bool = False, device: torch.device = CPU
) -> Trainer:
    return Trainer(
        model(),
        OPTIONS,
        device=device,
        dtype=dtype,
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


def learn(
    trainer: Learner, world: World, first: int = 0, loss: Loss = LOSS
) -> list[dict[str, float]]:
    """Steps from `first` on; the merged figures of each."""
    rows = []
    for step in range(first, STEPS):
        metrics = TokenMetrics()
        assert trainer.accumulate(batch(step), loss, metrics)
        norm = trainer.step(1e-2 / (step + 1))
        rows.append({**merge(world.gather([metrics])).result(), "grad_norm": norm})
    return rows


def figures(trainer: Learner, world: World, loss: Loss = LOSS) -> Results:
    """What a run sees of a trainer over a few steps."""
    trajectories = batch(0).trajectories
    before = trainer.logprobs(trajectories)
    return {
        "before": before,
        "rows": learn(trainer, world, loss=loss),
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
    for stage in (0, 2, 3):
        build = functools.partial(deepspeed_in_float16, world, stage)
        results[f"zero{stage}-float16"] = figures(build(), world, small_loss)
        results[f"zero{stage}-skipped"] = skipped(build, world, folder / f"skipped{stage}")
    results["no gradient"] = no_gradient(trainer)
    trainer.write_model(folder / "model", torch.float32)
    results["resumed"] = resumed(
        functools.partial(deepspeed, world, 3), world, folder / "checkpoint"
    )
    return results


def deepspeed_in_float16(world: World, stage: int) -> ShardedTrainer:
    """On any processor: DeepSpeed refuses those without instructions of their own for it."""
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    with mock.patch.object(accelerator, "is_fp16_supported", lambda: True):
        return deepspeed(world, stage, torch.float16)


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
    build = functools.partial(fsdp, world, torch.float16)
    results["fsdp-float16"] = figures(build(), world, small_loss)
    results["fsdp-skipped"] = skipped(build, world, folder / "skipped")
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


def skipped(build: Any, world: World, folder: Path) -> Results:
    """What becomes of a step whose gradient overflows in the last process alone, and of the next,
    also after the run was saved between the two and loaded.

    scales: (scale, steps skipped) before the step, after it, and after the next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build()
    scales = [read_scale(trainer)]
    logprobs = []
    is_last = world.rank == world.size - 1
    for loss in (small_loss, overflowing_loss if is_last else small_loss):
        trainer.accumulate(batch(1), loss, TokenMetrics())
        norm = trainer.step(1e-2)
        logprobs.append(np.concatenate(trainer.logprobs(batch(0).trajectories)))
    scales.append(read_scale(trainer))
    trainer.save(folder)
    world.barrier()
    other = build()
    other.load(folder)
    scales.append(read_scale(other))
    rows = [learn(each, world, STEPS - 1, small_loss) for each in (trainer, other)]
    after = [np.concatenate(t.logprobs(batch(0).trajectories)) for t in (trainer, other)]
    return {"norm": norm, "scales": scales, "logprobs": logprobs, "rows": rows, "after": after}


def read_scale(trainer: Learner) -> tuple[float, int]:
    scale = trainer.loss_scale
    assert scale is not None
    return scale.value, scale.skipped
