"""Runs of `recipes/grpo.py` over a real engine of this process, with a model of a few thousand
parameters whose rewards differ from reply to reply."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from recipes.actors.actor import Actor, InlineActor
from recipes.algorithms.presets import AlgorithmOptions
from recipes.asynchrony.async_options import AsyncOptions
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.run.run import Run
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from tests.helpers.char_model import CharAddition, char_model, char_tokenizer, write_char_model
from tests.helpers.engines import make_replica


class LeadingDigit(CharAddition):
    """A reward that a random model can find: the reply begins with a digit."""

    def verify(self, reply: str, problem: Any) -> float:
        return float(reply[:1].isdigit())


def async_options(
    out: Path, *, staleness: int | None = 2, engine_steps: int = 3, **changes: Any
) -> RunOptions:
    """Options of a short run. staleness: None is a synchronous run."""
    given = AsyncOptions()
    if staleness is not None:
        given = AsyncOptions(
            asynchronous=True, max_staleness=staleness, engine_steps=engine_steps or None
        )
    options = RunOptions(
        out=str(out),
        steps=6,
        eval_every=3,
        eval_prompts=8,
        checkpoint_every=0,
        rollout=RolloutOptions(prompts_per_step=3, samples=4, max_new_tokens=10),
        optimizer=OptimizerOptions(lr=1e-2),
        objective=AlgorithmOptions(algorithm="grpo"),
        asynchrony=given,
    )
    return dataclasses.replace(options, **changes)


def open_char_run(options: RunOptions, folder: Path, *, actor: Actor | None = None) -> Run:
    """A run over an engine that serves the model which the trainer has. folder: for its files."""
    model = char_model(16, 1)
    write_char_model(folder / "char", model)
    run = assemble(
        options,
        Ledger(),
        environment=LeadingDigit(),
        actor=actor or InlineActor(make_replica(folder / "char", max_running=16)),
        tokenizer=char_tokenizer(),
        trainer=Trainer(
            model,
            options.optimizer,
            device=torch.device("cpu"),
            dtype=torch.float32,
            temperature=options.rollout.temperature,
        ),
    )
    return run


def go(options: RunOptions, folder: Path) -> Run:
    """Run to the end."""
    with open_char_run(options, folder) as run:
        run.begin()
        train(run)
        run.finish()
    return run


def untimed(run: Run) -> list[dict[str, Any]]:
    """The rows of a run without what a clock has measured."""
    timed = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)}
        for row in run.folder.read_metrics()
    ]


def weights(run: Run) -> list[torch.Tensor]:
    """The trained parameters."""
    trainer = run.trainer
    assert isinstance(trainer, Trainer)
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]
