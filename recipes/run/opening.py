"""How a run begins: everything its options name is loaded, checked and put together."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from engine.protocol import SamplingParams
from recipes.actors.actor import Actor
from recipes.actors.launch import launch_actor, launch_reference
from recipes.actors.scorer import ScoringEngine
from recipes.algorithms.presets import resolve
from recipes.collecting.prompts import Prompts
from recipes.data.chat_style import chat_style
from recipes.environments.base import Environment, heldout_problems, problem_at
from recipes.environments.named_tasks import select_environment
from recipes.environments.task_check import CheckedTask, check_pool, check_task
from recipes.rewards.failed_share import FailedShare
from recipes.rewards.grading import Grading
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.open_reward_model import open_reward_model
from recipes.rewards.task_reward import task_reward
from recipes.run.display import Display
from recipes.run.ledger import Ledger
from recipes.run.progress import RunProgress
from recipes.run.run import Run
from recipes.run.run_folder import RunFolder, default_path
from recipes.run.tracking import Tracker
from recipes.settings.checks import holds_a_run, in_use, taken
from recipes.settings.options import RunOptions, flatten
from recipes.trainers.base import Learner
from recipes.trainers.model import load_trainer
from recipes.types import Problem
from recipes.world import World, open_world
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, load_tokenizer


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
        grading = open_grading(
            options.rewards,
            task.environment,
            _looked_at(options, task.environment),
            processes_here=world.size,
            open_model=functools.partial(open_reward_model, options=options, world=world),
        )
        on_failure.callback(grading.close)
        actor = launch_actor(options, world)
        on_failure.callback(actor.close)
        reference = launch_reference(options, world)
        if reference is not None:
            on_failure.callback(reference.close)
        check_pool(task, actor.state(), _max_new_tokens(options, task.environment))
        run = assemble(
            options,
            ledger,
            environment=task.environment,
            grading=grading,
            actor=actor,
            tokenizer=tokenizer,
            trainer=load_trainer(options, actor, world),
            world=world,
            reference=reference,
        )
        on_failure.pop_all()
    return run


def _read_task(options: RunOptions, tokenizer: Tokenizer) -> CheckedTask:
    environment = select_environment(
        options.task, options.data, needs_answer=options.rewards.uses_task
    )
    checkpoint = read_checkpoint(options.model, options.load_format, options.seed)
    return check_task(
        environment,
        Prompts(environment, tokenizer, (), chat_style(options.data, tokenizer.chat_template)),
        context_length=checkpoint.context_length,
        num_heldout=options.eval_prompts,
        skip_long=options.skip_long_prompts,
    )


def _looked_at(options: RunOptions, environment: Environment) -> list[Problem]:
    """Problems that tell which columns there are."""
    heldout = heldout_problems(environment, options.eval_prompts)
    return [*heldout, problem_at(environment, "train", options.seed, 0)]


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
    grading: Grading | None = None,
    reference: ScoringEngine | None = None,
) -> Run:
    """A run of these parts, whatever task and model the options name.

    reference: the engine that has the initial weights, where the trainer has not.
    """
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
        prompts=Prompts(
            environment,
            tokenizer,
            actor.state().eos_ids,
            chat_style(options.data, tokenizer.chat_template),
        ),
        grading=grading or Grading(task_reward(environment)),
        failed_share=FailedShare(options.rewards.max_failed_share),
        tokenizer=tokenizer,
        heldout=heldout_problems(environment, options.eval_prompts),
        actor=actor,
        trainer=trainer,
        reference=reference,
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
