"""How a run begins: everything its options name is loaded, checked and put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from engine.protocol import SamplingParams
from recipes.actors.actor import Actor
from recipes.actors.launch import (
    has_own_engine,
    launch_actor,
    launch_reference,
    needs_first_push,
)
from recipes.actors.scorer import ScoringEngine
from recipes.actors.teacher import check_teacher, launch_teacher
from recipes.algorithms.presets import Algorithm, resolve
from recipes.collecting.prompts import Prompts
from recipes.data.chat_style import chat_style
from recipes.environments.base import Environment, heldout_problems, problem_at
from recipes.environments.named_tasks import select_environment
from recipes.environments.task_check import CheckedTask, check_pool, check_task
from recipes.evaluation.eval_sets import CheckedSet, EvalSet, graded_as_run, read_sets
from recipes.evaluation.evaluation_options import MAIN_SET
from recipes.evaluation.measure import Evaluation
from recipes.rewards.failed_share import FailedShare
from recipes.rewards.grading import Grading
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.reward_models.open_reward_model import open_reward_model
from recipes.rewards.task_reward import task_reward
from recipes.run.display import Display
from recipes.run.ledger import Ledger
from recipes.run.progress import RunProgress
from recipes.run.run import Run
from recipes.run.run_folder import RunFolder, default_path
from recipes.run.tracking import Tracker
from recipes.settings.checks import holds_a_run, in_use, taken
from recipes.settings.options import PpoOptions, RunOptions, flatten
from recipes.trainers.base import Learner
from recipes.trainers.critic import Critic
from recipes.trainers.critic_model import check_critic_model
from recipes.trainers.model import load_critic, load_trainer
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routing_options import check_routers
from recipes.types import Problem
from recipes.world import World, open_world
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, load_tokenizer


def open_run(options: RunOptions, ledger: Ledger) -> Run:
    """Load everything the options name, with the other processes of the run if there are any.

    The task is checked against tokenizer and context before any weight is read."""
    tokenizer = load_tokenizer(options.model)
    context_length = _context_length(options)
    task = _read_task(options, tokenizer, context_length)
    sets = _read_sets(options, tokenizer, task, context_length)
    longest = task.longest + _max_new_tokens(options, task.environment)
    check_teacher(options, tokenizer, longest=min(longest, context_length))
    check_critic_model(options, tokenizer, longest=min(longest, context_length))
    placement = options.placement
    with ExitStack() as on_failure:
        world = open_world(
            device=options.device,
            needs_group=placement.trainer != "plain",
            colocated=has_own_engine(options),
        )
        on_failure.callback(world.close)
        grading = open_grading(
            options.rewards,
            task.environment,
            _looked_at(options, task.environment),
            processes_here=world.size,
            code=options.code,
            open_model=functools.partial(open_reward_model, options=options, world=world),
        )
        on_failure.callback(grading.close)
        actor = launch_actor(options, world)
        on_failure.callback(actor.close)
        reference = launch_reference(options, world)
        if reference is not None:
            on_failure.callback(reference.close)
        teacher = launch_teacher(options, actor.state(), world)
        if teacher is not None:
            on_failure.callback(teacher.close)
            max_new_tokens = _max_new_tokens(options, task.environment)
            check_pool(task, teacher.state, max_new_tokens, option="teacher_kv_memory_gb")
        for each in (task, *(checked.longest for checked in sets)):
            check_pool(each, actor.state(), _max_new_tokens(options, each.environment))
        shelf = RouteShelf(world=world)
        trainer = load_trainer(options, actor, world, shelf)
        if needs_first_push(options):
            # What they serve may be somebody's, whoever that was.
            actor.push(trainer.weights, 0, measure_memcpy=False)
        run = assemble(
            options,
            ledger,
            environment=task.environment,
            grading=grading,
            actor=actor,
            tokenizer=tokenizer,
            trainer=trainer,
            critic=load_critic(options, actor, trainer, world),
            world=world,
            reference=reference,
            teacher=teacher,
            sets=[checked.eval_set for checked in sets],
            shelf=shelf,
        )
        on_failure.pop_all()
    return run


def _context_length(options: RunOptions) -> int:
    """Tokens the engine will serve, prompt and reply together. Raises InvalidRequest for options
    of routers where the model has none."""
    checkpoint = read_checkpoint(options.model, options.load_format, options.seed)
    check_routers(options.routing, checkpoint.hf_config)
    return checkpoint.context_length


def _read_task(options: RunOptions, tokenizer: Tokenizer, context_length: int) -> CheckedTask:
    environment = select_environment(
        options.task, options.data, needs_answer=options.rewards.uses_task
    )
    return check_task(
        environment,
        Prompts(environment, tokenizer, (), chat_style(options.data, tokenizer.chat_template)),
        context_length=context_length,
        num_heldout=options.eval_prompts,
        skip_long=options.skip_long_prompts,
    )


def _looked_at(options: RunOptions, environment: Environment) -> list[Problem]:
    """Problems that tell which columns there are."""
    heldout = heldout_problems(environment, options.eval_prompts)
    return [*heldout, problem_at(environment, "train", options.seed, 0)]


def _read_sets(
    options: RunOptions, tokenizer: Tokenizer, task: CheckedTask, context_length: int
) -> list[CheckedSet]:
    return read_sets(
        options.evaluation.eval_set,
        options.data,
        tokenizer,
        trained=task.environment,
        context_length=context_length,
        num_problems=options.eval_prompts,
        skip_long=options.skip_long_prompts,
        needs_answer=options.rewards.uses_task,
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
    critic: Critic | None = None,
    world: World | None = None,
    grading: Grading | None = None,
    reference: ScoringEngine | None = None,
    teacher: ScoringEngine | None = None,
    sets: Sequence[EvalSet] = (),
    shelf: RouteShelf | None = None,
) -> Run:
    """A run of these parts, whatever task, sets and model the options name.

    reference: the engine that has the initial weights, where the trainer has not. teacher: that
    of a distillation. sets: to evaluate on beside the held-out problems of the task. shelf: the
    trainer's, where routes are replayed.
    """
    world = world or World()
    folder = open_folder(options, world)
    folder.write_config(flatten(options))
    console = None if world.is_main else Console(quiet=True)
    display = Display(f"{environment.name} -> {folder.path}", options.steps, console)
    if world.is_main:
        actor.watch(display.generating)
    max_new_tokens = _max_new_tokens(options, environment)
    grading = grading or Grading(task_reward(environment, code=options.code))
    style = chat_style(options.data, tokenizer.chat_template)
    heldout = EvalSet(
        name=MAIN_SET,
        environment=environment,
        problems=tuple(heldout_problems(environment, options.eval_prompts)),
    )
    alike = [s for s in sets if graded_as_run(options.rewards, environment, s.environment)]
    return Run(
        options=options,
        algorithm=_algorithm(options, max_new_tokens),
        environment=environment,
        sampling=SamplingParams(
            max_new_tokens=max_new_tokens, temperature=options.rollout.temperature
        ),
        prompts=Prompts(environment, tokenizer, actor.state().eos_ids, style),
        grading=grading,
        failed_share=FailedShare(options.rewards.max_failed_share),
        tokenizer=tokenizer,
        evaluation=Evaluation(
            [heldout, *sets],
            options.evaluation,
            tokenizer=tokenizer,
            eos_ids=actor.state().eos_ids,
            max_new_tokens=options.rollout.max_new_tokens,
            style=style,
            gradings={MAIN_SET: grading} | {each.name: grading for each in alike},
            code=options.code,
            world=world,
        ),
        actor=actor,
        trainer=trainer,
        critic=critic,
        reference=reference,
        teacher=teacher,
        world=world,
        folder=folder,
        ledger=ledger,
        display=display,
        tracker=Tracker(options.wandb if world.is_main else "off", folder.path, flatten(options)),
        progress=RunProgress(),
        shelf=shelf or RouteShelf(world=world),
    )


def _algorithm(options: RunOptions, max_new_tokens: int) -> Algorithm:
    algorithm = resolve(options.objective, max_new_tokens)
    if options.asynchrony.asynchronous and not options.asynchrony.bypass:
        algorithm = dataclasses.replace(algorithm, decoupled=True)
    if isinstance(options, PpoOptions):
        gae_lambda = options.value_function.gae_lambda
        algorithm = dataclasses.replace(algorithm, gae_lambda=gae_lambda)
    return algorithm


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
