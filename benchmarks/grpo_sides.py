"""The sides of `benchmarks/grpo_step.py`: each takes one GRPO step when it is told to."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from grpo_baseline import Baseline
from grpo_padded import PaddedTrainer

from recipes.actors.launch import launch_actor
from recipes.algorithms.presets import AlgorithmOptions
from recipes.collecting.prompts import Prompts
from recipes.environments.base import Environment, problem_at
from recipes.environments.named_tasks import select_environment
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.base import Learner
from recipes.trainers.model import engine_dtype, load_trainer, trainer_device
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.types import Message, Problem
from recipes.world import World
from rollout.launch import read_checkpoint
from rollout.offline import load_tokenizer
from trainer_bridge import load_causal_lm

PHASES = ("generate", "score", "train", "push", "other", "step")
FIGURES = (*PHASES, "mixed_groups", "mean_length")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every side does. length: tokens of every reply, exactly; 0 ends replies as the task
    does, at its stop tokens or its own limit."""

    model: str
    task: str
    dtype: str
    prompts: int
    samples: int
    lr: float
    rows: int
    seed: int
    length: int = 0

    @property
    def replies(self) -> str:
        """The replies in words."""
        return f"{self.length} tokens" if self.length else "of the task"


class Side(Protocol):
    """One of those that are compared."""

    def step(self) -> dict[str, float]:
        """One step; seconds by phase, and `FIGURES` beside them."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Coin:
    """A task whose replies are graded by a coin, tossed by the reply's own text.

    Which groups have spread, and so how much there is to train on, then depends neither on what
    the model has learned nor on whether a long reply answers anything.
    """

    def __init__(self, task: Environment) -> None:
        self._task = task
        self.name = task.name
        self.max_new_tokens = task.max_new_tokens
        self.heldout_one_in = task.heldout_one_in

    def draw(self, rng: random.Random) -> Problem:
        """Any problem of the task."""
        return self._task.draw(rng)

    def messages(self, problem: Problem) -> list[Message]:
        """The chat that asks the problem."""
        return self._task.messages(problem)

    def verify(self, reply: str, problem: Problem) -> float:
        """0.0 or 1.0."""
        digest = hashlib.blake2b(f"{problem.key}\0{reply}".encode(), digest_size=1).digest()
        return float(digest[0] & 1)


class OurSide:
    """The recipe with its engine. tree: whether its trainer packs a batch as a prefix tree."""

    def __init__(self, work: Work, folder: Path, *, tree: bool) -> None:
        options = RunOptions(
            task=work.task,
            model=work.model,
            dtype=work.dtype,  # type: ignore[arg-type]
            seed=work.seed,
            out=str(folder),
            eval_every=0,
            eval_prompts=1,
            checkpoint_every=0,
            rollout=RolloutOptions(
                prompts_per_step=work.prompts,
                samples=work.samples,
                max_new_tokens=work.length or None,
            ),
            optimizer=OptimizerOptions(lr=work.lr),
            # As the plain script: no step draws more groups than it is told to.
            objective=AlgorithmOptions(algorithm="grpo"),
        )
        actor = launch_actor(options)
        self.dtype = actor.state().dtype
        trainer: Learner = load_trainer(options, actor)
        if not tree:
            trainer = _padded(options, engine_dtype(actor), work.rows)
        self._run = assemble(
            options,
            Ledger(),
            environment=Coin(select_environment(work.task)),
            actor=actor,
            tokenizer=load_tokenizer(work.model),
            trainer=trainer,
        )
        self._run.sampling = msgspec.structs.replace(self._run.sampling, min_new_tokens=work.length)
        self._run.begin()
        self._prompts = work.prompts

    def step(self) -> dict[str, float]:
        """See `Side`."""
        run = self._run
        # What the other sides did meanwhile is no time of this one's.
        run.ledger.take()
        run.options = replace(run.options, steps=run.progress.step + 1)
        train(run)
        row: dict[str, Any] = run.folder.read_metrics()[-1]
        return {
            **{phase: row[f"timing_s/{phase}"] for phase in PHASES},
            "mixed_groups": self._prompts * (1 - row["frac_reward_zero_std"]),
            "mean_length": row["completions/mean_length"],
        }

    def close(self) -> None:
        """See `Side`."""
        self._run.actor.close()


class PlainSide:
    """The plain script."""

    def __init__(self, work: Work, dtype: torch.dtype) -> None:
        self._work = work
        self._environment = Coin(select_environment(work.task))
        tokenizer = load_tokenizer(work.model)
        checkpoint = read_checkpoint(work.model)
        self._baseline = Baseline(
            load_causal_lm(checkpoint.hf_config, checkpoint.tensors),
            Prompts(self._environment, tokenizer, tokenizer.eos_ids),
            dtype=dtype,
            samples=work.samples,
            min_new_tokens=work.length,
            max_new_tokens=work.length or self._environment.max_new_tokens,
            lr=work.lr,
            rows_per_microbatch=work.rows,
        )
        self._next = 0
        torch.manual_seed(work.seed)

    def step(self) -> dict[str, float]:
        """See `Side`."""
        indices = range(self._next, self._next + self._work.prompts)
        self._next = indices.stop
        problems = [
            problem_at(self._environment, "train", self._work.seed, index) for index in indices
        ]
        seconds = self._baseline.step(problems, self._environment)
        phases = {p: getattr(seconds, p) for p in PHASES if p != "other"}
        extra = {name: seconds.extra[name] for name in ("mixed_groups", "mean_length")}
        return {**phases, "other": 0.0, **extra}

    def close(self) -> None:
        """See `Side`."""


def _padded(options: RunOptions, dtype: torch.dtype, rows: int) -> PaddedTrainer:
    """As `load_trainer` makes the other."""
    checkpoint = read_checkpoint(options.model)
    trainer = PaddedTrainer(
        load_causal_lm(checkpoint.hf_config, checkpoint.tensors),  # type: ignore[arg-type]
        options.optimizer,
        device=trainer_device(options, World()),
        dtype=dtype,
        temperature=options.rollout.temperature,
    )
    trainer.rows = rows
    return trainer
