"""A training run: its parts, its beginning or resumption, and what follows each step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import InvalidRequest
from engine.protocol import SamplingParams
from recipes.actor import Actor, launch_actor
from recipes.algorithms.presets import Algorithm, resolve
from recipes.collect import evaluate
from recipes.command_line import flatten
from recipes.display import Display
from recipes.environments.base import Environment, heldout_problems, problem_at
from recipes.environments.select import select_environment
from recipes.ledger import Ledger
from recipes.model import engine_dtype, load_trainer, save_model
from recipes.options import Options
from recipes.progress import Progress
from recipes.prompts import Prompts
from recipes.report import Collected, push_figures, rollout_figures, time_figures
from recipes.run_folder import RunFolder, default_path
from recipes.tracking import Tracker
from recipes.trainers.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from recipes.trainers.plain import Trainer
from recipes.trainers.schedule import learning_rate
from recipes.types import Problem
from rollout.offline import Tokenizer, load_tokenizer
from trainer_bridge import PushReport

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """Everything the loop works with; see `open_run`."""

    options: Options
    algorithm: Algorithm
    environment: Environment
    sampling: SamplingParams
    prompts: Prompts
    tokenizer: Tokenizer
    heldout: list[Problem]
    actor: Actor
    trainer: Trainer
    folder: RunFolder
    ledger: Ledger
    display: Display
    tracker: Tracker
    progress: Progress

    @property
    def max_new_tokens(self) -> int:
        """Longest reply, in tokens."""
        return self.sampling.max_new_tokens

    def goes_on(self) -> bool:
        """Whether another step is to be taken."""
        minutes = self.options.minutes
        in_time = minutes is None or self.progress.total_seconds < 60 * minutes
        return self.progress.step < self.options.steps and in_time

    def next_problems(self) -> list[Problem]:
        """The next problems of the training stream, which depends on the seed alone."""
        first = self.progress.position
        self.progress.position += self.options.rollout.prompts_per_step
        return [
            problem_at(self.environment, "train", self.options.seed, index)
            for index in range(first, self.progress.position)
        ]

    def learning_rate(self) -> float:
        """The rate of the current step."""
        optimizer = self.options.optimizer
        return learning_rate(
            self.progress.step,
            peak=optimizer.lr,
            schedule=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            total_steps=self.options.steps,
        )

    def begin(self) -> None:
        """Continue from the last checkpoint, or measure the model before it learns."""
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        if checkpoint is not None:
            trainer_state, progress = load_checkpoint(checkpoint)
            self.trainer.load_state_dict(trainer_state)
            self.progress = Progress(**progress)
            version = self.progress.step
            self.actor.push(self.trainer.model, version, measure_memcpy=False)
            self.display.note(f"continuing after step {version}")
        self.folder.truncate(self.progress.step)
        self._spend("startup")
        if self.progress.eval_before is None:
            self._evaluate()

    def finish_step(
        self, collected: Collected, figures: dict[str, float], pushed: PushReport
    ) -> None:
        """Count the step; report it; evaluate and checkpoint where they are due."""
        seconds = self.ledger.take()
        self.progress.spent(seconds)
        self.progress.step += 1
        step = self.progress.step
        row: dict[str, float] = {
            "step": step,
            **rollout_figures(collected.sampled, seconds),
            **figures,
            **push_figures(pushed),
            **time_figures(seconds),
        }
        if _due(step, self.options.eval_every):
            row["timing_s/eval"] = self._evaluate()
            row["eval/accuracy"] = self.progress.accuracy or 0.0
        self.folder.append_metrics(row)
        self.folder.append_samples(step, collected.sampled)
        self.tracker.log(row)
        self.display.show(row)
        if pushed.memcpy_seconds is not None:
            self.display.note(f"push of {pushed}")
        if _due(step, self.options.checkpoint_every):
            self._checkpoint()

    def finish(self) -> dict[str, object]:
        """Measure, save the model and write the summary, which is returned."""
        if self.progress.accuracy_step != self.progress.step:
            self._evaluate()
        self.display.note("saving the model")
        dtype = engine_dtype(self.actor)
        save_model(self.trainer.model, self.tokenizer, self.folder.model, dtype)
        assert self.progress.eval_before is not None and self.progress.accuracy is not None
        title = f"{self.environment.name}, {self.options.objective.algorithm}"
        self.folder.draw_curve(title, self.progress.eval_before)
        self._spend("save")
        summary = self._summary(dtype)
        self.folder.write_summary(summary)
        self.tracker.close(summary)
        return summary

    def _summary(self, dtype: torch.dtype) -> dict[str, object]:
        progress = self.progress
        return {
            "task": self.environment.name,
            "seed": self.options.seed,
            "steps": progress.step,
            "seconds": progress.total_seconds,
            "eval_before": progress.eval_before,
            "eval_after": progress.accuracy,
            "model": self.options.model,
            "device": self.actor.state().device,
            "dtype": str(dtype).removeprefix("torch."),
            "algorithm": self.options.objective.algorithm,
            "best": {"accuracy": progress.best_accuracy, "step": progress.best_step},
            "eval_prompts": len(self.heldout),
            "seconds_by_phase": progress.seconds,
        }

    def _evaluate(self) -> float:
        self.display.note(f"evaluating {len(self.heldout)} held-out problems")
        with self.ledger.phase("eval"):
            accuracy = evaluate(self.actor, self.prompts, self.heldout, self.max_new_tokens)
        self.progress.measured(accuracy)
        self.display.note(f"held-out accuracy {accuracy:.3f} after step {self.progress.step}")
        return self._spend("eval")

    def _checkpoint(self) -> None:
        """The time it takes is not in its own record: it is not over when that is written."""
        state = self.trainer.state_dict()
        progress = self.progress.as_dict()
        save_checkpoint(self.folder.checkpoints, self.progress.step, state, progress)
        self._spend("checkpoint")

    def _spend(self, phase: str) -> float:
        """Book all time since the last reading under one phase; returns it."""
        seconds = sum(self.ledger.take().values())
        self.progress.spent({phase: seconds})
        return seconds


def open_run(options: Options, ledger: Ledger) -> Run:
    """Load everything the options name."""
    environment = select_environment(options.task)
    actor = launch_actor(options)
    return assemble(
        options,
        ledger,
        environment=environment,
        actor=actor,
        tokenizer=load_tokenizer(options.model),
        trainer=load_trainer(options, actor),
    )


def assemble(
    options: Options,
    ledger: Ledger,
    *,
    environment: Environment,
    actor: Actor,
    tokenizer: Tokenizer,
    trainer: Trainer,
) -> Run:
    """A run of these parts, whatever task and model the options name."""
    folder = open_folder(options)
    folder.write_config(flatten(options))
    display = Display(f"{environment.name} -> {folder.path}", options.steps)
    actor.watch(display.generating)
    max_new_tokens = options.rollout.max_new_tokens or environment.max_new_tokens
    return Run(
        options=options,
        algorithm=resolve(options.objective, max_new_tokens),
        environment=environment,
        sampling=SamplingParams(
            max_new_tokens=max_new_tokens, temperature=options.rollout.temperature
        ),
        prompts=Prompts(environment, tokenizer, actor.state().eos_ids),
        tokenizer=tokenizer,
        heldout=heldout_problems(environment, options.eval_prompts),
        actor=actor,
        trainer=trainer,
        folder=folder,
        ledger=ledger,
        display=display,
        tracker=Tracker(options.wandb, folder.path, flatten(options)),
        progress=Progress(),
    )


def open_folder(options: Options) -> RunFolder:
    """The run folder: the one to resume, the one asked for, or a new one.

    Raises InvalidRequest if `out` already holds a run.
    """
    if options.resume is not None:
        return RunFolder(Path(options.resume))
    path = Path(options.out) if options.out else default_path(options.task)
    if (path / "config.json").exists():
        raise InvalidRequest(
            f"out: {path} already holds a run; continue it with --resume {path}", field="out"
        )
    return RunFolder(path)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
