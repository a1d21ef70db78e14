"""A training run: its parts, its beginning or resumption, and what follows each step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from rich.console import Console

from engine.protocol import SamplingParams
from recipes.actor import Actor
from recipes.advice import WINDOW, advice
from recipes.algorithms.presets import Algorithm, resolve
from recipes.checks import holds_a_run, in_use, taken
from recipes.collect import evaluate
from recipes.display import Display
from recipes.environments.base import Environment, heldout_problems, problem_at
from recipes.environments.named_tasks import select_environment
from recipes.grading import Grading
from recipes.launch import launch_actor
from recipes.ledger import Ledger
from recipes.model import engine_dtype, load_trainer
from recipes.options import RunOptions, flatten
from recipes.progress import RunProgress
from recipes.prompts import Prompts
from recipes.report import Collected, push_figures, rollout_figures, time_figures
from recipes.run_folder import RunFolder, default_path
from recipes.saving import num_elements, save_folder
from recipes.task_check import CheckedTask, check_pool, check_task
from recipes.tracking import Tracker
from recipes.trainers.base import Learner
from recipes.trainers.checkpoint import (
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from recipes.trainers.schedule import learning_rate
from recipes.types import Group, Problem
from recipes.world import World, open_world
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, free_bytes, load_tokenizer
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
    tokenizer: Tokenizer
    heldout: list[Problem]
    actor: Actor
    trainer: Learner
    world: World
    folder: RunFolder
    ledger: Ledger
    display: Display
    tracker: Tracker
    progress: RunProgress
    surplus: list[Group] = field(default_factory=list)
    """Groups with spread that were sampled beyond what a step trains on, oldest first."""
    _recent: list[dict[str, float]] = field(default_factory=list)
    _advised: bool = False

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
            progress, self.surplus = load_checkpoint(checkpoint, self.trainer.load)
            self.progress = RunProgress(**progress)
            version = self.progress.step
            self.actor.push(self.trainer.weights, version, measure_memcpy=False)
            self.display.note(f"continuing after step {version}")
        self.folder.truncate(self.progress.step)
        self._look_for_room()
        self._spend("startup")
        if self.progress.eval_before is None:
            self._evaluate()

    def _look_for_room(self) -> None:
        """Say at once that a checkpoint will not fit: the run may end before one is due."""
        needed = checkpoint_bytes(self.trainer.weights)
        if self.options.checkpoint_every and self.world.is_main:
            free = free_bytes(self.folder.path)
            if free < needed:
                self.display.note(
                    f"a checkpoint takes about {needed:,} bytes, and {free:,} are free at "
                    f"{self.folder.path}: make room, or give --checkpoint-every 0"
                )

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
            **self._tell_ungraded(),
        }
        if _due(step, self.options.eval_every):
            row["timing_s/eval"] = self._evaluate()
            row["eval/accuracy"] = self.progress.accuracy or 0.0
        self.folder.append_metrics(row)
        self.folder.append_samples(step, collected.sampled)
        self.tracker.log(row)
        self.display.show(row)
        self._advise(row)
        if pushed.memcpy_seconds is not None:
            self.display.note(f"push of {pushed}")
        if _due(step, self.options.checkpoint_every):
            self._checkpoint()

    def _tell_ungraded(self) -> dict[str, float]:
        """Count the replies that no grader got through, and name the first of them."""
        ungraded = self.world.gather(self.grading.take_ungraded())
        if ungraded:
            self.display.note(f"{len(ungraded)} replies not graded, reward 0; {ungraded[0]}")
        return {"completions/num_ungraded": float(len(ungraded))}

    def _advise(self, row: dict[str, float]) -> None:
        """Say so, once each time it begins, when the run has nothing to learn from."""
        self._recent = [*self._recent[1 - WINDOW :], row]
        told = advice(self._recent)
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
        title = f"{self.environment.name}, {self.options.objective.algorithm}"
        self.folder.draw_curve(title, self.progress.eval_before)
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
            "trainer": self.options.placement.trainer,
            "trainer_processes": self.world.size,
            "best": {"accuracy": progress.best_accuracy, "step": progress.best_step},
            "eval_prompts": len(self.heldout),
            "seconds_by_phase": progress.seconds,
        }

    def _evaluate(self) -> float:
        self.display.note(f"evaluating {len(self.heldout)} held-out problems")
        with self.ledger.phase("eval"):
            accuracy = evaluate(
                self.actor,
                self.prompts,
                self.heldout,
                self.max_new_tokens,
                self.world,
                grader=self.grading,
            )
        self.progress.measured(accuracy)
        self.display.note(f"held-out accuracy {accuracy:.3f} after step {self.progress.step}")
        return self._spend("eval")

    def _checkpoint(self) -> None:
        """The time it takes is not in its own record: it is not over when that is written."""
        progress = self.progress.as_dict()
        step, save = self.progress.step, self.trainer.save
        save_checkpoint(
            self.folder.checkpoints,
            step,
            save,
            progress,
            self.world,
            surplus=self.surplus,
            num_bytes=checkpoint_bytes(self.trainer.weights),
        )
        self._spend("checkpoint")

    def _spend(self, phase: str) -> float:
        """Book all time since the last reading under one phase; returns it."""
        seconds = sum(self.ledger.take().values())
        self.progress.spent({phase: seconds})
        return seconds


def open_run(options: RunOptions, ledger: Ledger) -> Run:
    """Load everything the options name, with the other processes of the run if there are any.

    The task is checked against tokenizer and context before any weight is read."""
    tokenizer = load_tokenizer(options.model)
    task = _read_task(options, tokenizer)
    placement = options.placement
    with ExitStack() as on_failure:
        world = open_world(
            device=options.device,
            needs_group=placement.trainer != "plain",
            colocated=placement.rollout_gpus == 0,
        )
        on_failure.callback(world.close)
        actor = launch_actor(options, world)
        on_failure.callback(actor.close)
        check_pool(task, actor.state(), _max_new_tokens(options, task.environment))
        run = assemble(
            options,
            ledger,
            environment=task.environment,
            actor=actor,
            tokenizer=tokenizer,
            trainer=load_trainer(options, actor, world),
            world=world,
        )
        on_failure.pop_all()
    return run


def _read_task(options: RunOptions, tokenizer: Tokenizer) -> CheckedTask:
    environment = select_environment(options.task)
    checkpoint = read_checkpoint(options.model, options.load_format, options.seed)
    return check_task(
        environment,
        Prompts(environment, tokenizer, ()),
        context_length=checkpoint.context_length,
        num_heldout=options.eval_prompts,
        skip_long=options.skip_long_prompts,
    )


def _max_new_tokens(options: RunOptions, environment: Environment) -> int:
    return options.rollout.max_new_tokens or environment.max_new_tokens


def assemble(
    options: RunOptions,
    ledger: Ledger,
    *,
    environment: Environment,
    actor: Actor,
    tokenizer: Tokenizer,
    trainer: Learner,
    world: World | None = None,
) -> Run:
    """A run of these parts, whatever task and model the options name."""
    world = world or World()
    folder = open_folder(options, world)
    folder.write_config(flatten(options))
    console = None if world.is_main else Console(quiet=True)
    display = Display(f"{environment.name} -> {folder.path}", options.steps, console)
    if world.is_main:
        actor.watch(display.generating)
    max_new_tokens = _max_new_tokens(options, environment)
    return Run(
        options=options,
        algorithm=resolve(options.objective, max_new_tokens),
        environment=environment,
        sampling=SamplingParams(
            max_new_tokens=max_new_tokens, temperature=options.rollout.temperature
        ),
        prompts=Prompts(environment, tokenizer, actor.state().eos_ids),
        grading=Grading(environment, processes_here=world.size),
        tokenizer=tokenizer,
        heldout=heldout_problems(environment, options.eval_prompts),
        actor=actor,
        trainer=trainer,
        world=world,
        folder=folder,
        ledger=ledger,
        display=display,
        tracker=Tracker(options.wandb if world.is_main else "off", folder.path, flatten(options)),
        progress=RunProgress(),
    )


def open_folder(options: RunOptions, world: World | None = None) -> RunFolder:
    """The run folder: the one to resume, the one asked for, or a new one; collective.

    Raises InvalidRequest if `out` already holds a run, or another process has the folder.
    """
    world = world or World()
    if options.resume is not None:
        return _claimed(Path(options.resume), world)
    path = world.from_main(Path(options.out) if options.out else default_path(options.task))
    if world.from_main(holds_a_run(path)):
        raise taken(path)
    return _claimed(path, world)


def _claimed(path: Path, world: World) -> RunFolder:
    folder = RunFolder(path, active=world.is_main)
    if not world.from_main(folder.claim()):
        raise in_use(path)
    return folder


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
