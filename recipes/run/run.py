"""A training run: its parts, its beginning or resumption, and what follows each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from engine.protocol import SamplingParams
from recipes.actors.actor import Actor
from recipes.actors.scorer import ScoringEngine
from recipes.algorithms.presets import Algorithm
from recipes.collecting.prompts import Prompts
from recipes.environments.base import Environment, problem_at
from recipes.evaluation.eval_table import tell
from recipes.evaluation.measure import Evaluation
from recipes.rewards.failed_share import FailedShare, failed_figures, tell_failed
from recipes.rewards.grading import Grading
from recipes.run.advice import WINDOW, advice
from recipes.run.display import Display
from recipes.run.kept_rollouts import rollout_lines
from recipes.run.ledger import Ledger
from recipes.run.progress import RunProgress
from recipes.run.report import Collected, push_figures, rollout_figures, time_figures
from recipes.run.run_folder import RunFolder
from recipes.run.saving import num_elements, save_folder
from recipes.run.tracking import Tracker
from recipes.settings.options import PpoOptions, RunOptions
from recipes.trainers.base import Learner
from recipes.trainers.checkpoint import (
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    load_unfinished,
    save_checkpoint,
)
from recipes.trainers.critic import Critic
from recipes.trainers.model import engine_dtype
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.schedule import learning_rate
from recipes.types import Group, Problem, UnfinishedGroup
from recipes.world import World
from rollout.offline import Tokenizer, free_bytes
from trainer_bridge import PushReport


@dataclass(kw_only=True)
class Run:
    """Everything the loop works with; see `open_run`. Used as a context manager around the loop,
    it shows the display, and frees the engine and leaves the other processes at the end."""

    options: RunOptions
    algorithm: Algorithm
    environment: Environment
    sampling: SamplingParams
    prompts: Prompts
    grading: Grading
    failed_share: FailedShare
    tokenizer: Tokenizer
    evaluation: Evaluation
    actor: Actor
    trainer: Learner
    critic: Critic | None = None
    """Of PPO."""
    world: World
    folder: RunFolder
    ledger: Ledger
    display: Display
    tracker: Tracker
    progress: RunProgress
    shelf: RouteShelf
    """Routes of the replies that this process sampled, where they are replayed."""
    reference: ScoringEngine | None = None
    teacher: ScoringEngine | None = None
    surplus: list[Group] = field(default_factory=list)
    """Groups with spread that were sampled beyond what a step trains on, oldest first."""
    unfinished: list[UnfinishedGroup] = field(default_factory=list)
    """Groups that were being sampled at the last checkpoint, or when the loop stopped for it."""
    _recent: list[dict[str, float]] = field(default_factory=list)
    _advised: bool = False

    @property
    def dashboard(self) -> str:
        """See `command.Runs`."""
        return self.options.dashboard if self.world.is_main else "off"

    @property
    def max_new_tokens(self) -> int:
        """Longest reply, in tokens."""
        return self.sampling.max_new_tokens

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.__exit__()
        self.grading.close()
        self.actor.close()
        for engine in (self.reference, self.teacher):
            if engine is not None:
                engine.close()
        self.world.close()
        self.folder.close()

    def goes_on(self) -> bool:
        """Whether another step is to be taken; the same in all processes."""
        in_time = True
        if self.options.minutes is not None:
            spent = self.world.from_main(self.progress.total_seconds)
            in_time = spent < 60 * self.options.minutes
        return self.progress.step < self.options.steps and in_time

    def next_problems(self) -> tuple[list[Problem], int]:
        """This process's share of the next problems of the training stream, which depends on
        the seed alone, and the place of the first of them among those of the step."""
        position, num = self.progress.position, self.options.rollout.prompts_per_step
        self.progress.position += num
        share = self.world.share(num)
        problems = [
            problem_at(self.environment, "train", self.options.seed, position + index)
            for index in share
        ]
        return problems, share.start

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
            progress, self.surplus = load_checkpoint(checkpoint, self._load)
            self.unfinished = load_unfinished(checkpoint)
            self.progress = RunProgress.from_dict(progress)
            version = self.progress.step
            self.actor.push(self.trainer.weights, version, measure_memcpy=False)
            self.display.note(f"continuing after step {version}")
        self.folder.truncate(-1 if checkpoint is None else self.progress.step)
        self._look_for_room()
        self._spend("startup")
        if self.progress.eval_before is None:
            self._evaluate()

    def _look_for_room(self) -> None:
        """Say at once that a checkpoint will not fit: the run may end before one is due."""
        needed = self._checkpoint_bytes()
        if self.options.checkpoint_every and self.world.is_main:
            free = free_bytes(self.folder.path)
            if free < needed:
                self.display.note(
                    f"a checkpoint takes about {needed:,} bytes, and {free:,} are free at "
                    f"{self.folder.path}: make room, or give --checkpoint-every 0"
                )

    def pauses_after_step(self) -> bool:
        """Whether the step under way ends with an evaluation or a checkpoint, for which nothing
        else may be on the engine."""
        step, options = self.progress.step + 1, self.options
        return _due(step, options.eval_every) or _due(step, options.checkpoint_every)

    def finish_step(
        self, collected: Collected, figures: dict[str, float], pushed: PushReport
    ) -> None:
        """Count the step; report it; evaluate and checkpoint where they are due."""
        seconds = self.ledger.take()
        self.progress.spent(seconds)
        self.progress.step += 1
        self.shelf.keep(t.routes for group in self.surplus for t in group.trajectories)
        step = self.progress.step
        row: dict[str, float] = {
            "step": step,
            **rollout_figures(
                collected.sampled,
                self._sampling_seconds(seconds),
                compares_group=self.algorithm.compares_problem,
            ),
            **figures,
            **push_figures(pushed),
            **time_figures(seconds),
            **failed_figures(collected.sampled),
        }
        if _due(step, self.options.eval_every):
            row |= self._evaluate()
        self.folder.append_metrics(row)
        self.folder.append_samples(step, collected.sampled)
        self._keep_rollouts(collected.sampled)
        self.tracker.log(row)
        self.display.show(row)
        if failed := tell_failed(collected.sampled):
            self.display.note(failed)
        self.failed_share.add(collected.sampled)
        self._advise(row)
        if pushed.memcpy_seconds is not None:
            self.display.note(f"push of {pushed}")
        if _due(step, self.options.eval_every):
            self.folder.draw_plots()
            self.tracker.log_rollouts(step, collected.sampled)
        if _due(step, self.options.checkpoint_every):
            self._checkpoint()

    def _keep_rollouts(self, groups: Sequence[Group]) -> None:
        """Of the main process alone: the others write no files."""
        num = self.options.keep_rollouts
        if num and self.world.is_main:
            token_bytes = self.tokenizer.added_bytes(skip_special_tokens=False)
            lines = rollout_lines(self.progress.step, groups, token_bytes, num=num)
            self.folder.append_rollouts(lines)

    def _sampling_seconds(self, seconds: dict[str, float]) -> dict[str, float]:
        """The phases of a step, with the whole step for sampling where engines go on beside it."""
        options = self.options
        beside = options.asynchrony.asynchronous and options.placement.rollout_gpus > 0
        return {**seconds, "generate": sum(seconds.values())} if beside else seconds

    def _advise(self, row: dict[str, float]) -> None:
        """Say so, once each time it begins, when the run has nothing to learn from."""
        self._recent = [*self._recent[1 - WINDOW :], row]
        told = advice(self._recent, self.algorithm)
        if told and not self._advised:
            self.display.note(told)
        self._advised = bool(told)

    def finish(self) -> dict[str, object]:
        """Measure, save the model and write the summary, which is returned."""
        if self.progress.accuracy_step != self.progress.step:
            self._evaluate()
        self.display.note("saving the model")
        dtype = engine_dtype(self.actor)
        save_folder(
            self.folder.model,
            self.world,
            save=lambda folder: self.trainer.write_model(folder, dtype),
            complete=self.tokenizer.write_hf,
            num_bytes=dtype.itemsize * num_elements(self.trainer.weights),
        )
        assert self.progress.eval_before is not None and self.progress.accuracy is not None
        self.folder.draw_plots()
        self._spend("save")
        summary = self._summary(dtype)
        self.folder.write_summary(summary)
        self.tracker.close(summary)
        # A process that fails on its way out must not end one that is still writing.
        self.world.barrier()
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
            **self._critic_told(),
            "trainer": self.options.placement.trainer,
            "trainer_processes": self.world.size,
            "best": {"accuracy": progress.best_accuracy, "step": progress.best_step},
            "eval_prompts": len(self.evaluation.sets[0].problems),
            "evaluation": {"before": progress.figures_before, "after": progress.figures},
            "seconds_by_phase": progress.seconds,
        }

    def _critic_told(self) -> dict[str, object]:
        """The critic's network and the model that it started from, where there is one."""
        if not isinstance(self.options, PpoOptions):
            return {}
        given = self.options.value_function
        model = given.critic_model or self.options.model
        return {"critic": {"network": given.critic, "model": model}}

    def _evaluate(self) -> dict[str, float]:
        """Measure the weights on every set; the figures, and the time it took."""
        sets = self.evaluation.sets
        self.display.note(
            f"evaluating {sum(len(each.problems) for each in sets)} held-out problems"
        )
        with self.ledger.phase("eval"):
            figures = self.evaluation.measure(self.actor)
        self.progress.measured(figures)
        step = self.progress.step
        for told in tell(figures, self.evaluation.rewarded):
            self.display.note(f"{told} after step {step}")
        row = {"step": step, **figures}
        self.folder.append_evaluation(row)
        self.tracker.log(row)
        return {**figures, "timing_s/eval": self._spend("eval")}

    def _checkpoint(self) -> None:
        """The time it takes is not in its own record: it is not over when that is written."""
        progress = self.progress.as_dict()
        save_checkpoint(
            self.folder.checkpoints,
            self.progress.step,
            self._save,
            progress,
            self.world,
            surplus=self.surplus,
            unfinished=self.unfinished,
            num_bytes=self._checkpoint_bytes(),
        )
        self._spend("checkpoint")

    def _checkpoint_bytes(self) -> int:
        critic = 0 if self.critic is None else self.critic.checkpoint_bytes()
        return checkpoint_bytes(self.trainer.weights) + critic

    def _save(self, folder: Path) -> None:
        self.trainer.save(folder)
        if self.critic is not None:
            self.critic.save(folder)

    def _load(self, folder: Path) -> None:
        self.trainer.load(folder)
        if self.critic is not None:
            self.critic.load(folder)

    def _spend(self, phase: str) -> float:
        """Book all time since the last reading under one phase; returns it."""
        seconds = sum(self.ledger.take().values())
        self.progress.spent({phase: seconds})
        return seconds


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
