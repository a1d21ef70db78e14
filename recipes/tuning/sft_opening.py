"""How a supervised run begins: everything its options name is loaded, checked and put together."""

from __future__ import annotations

from contextlib import ExitStack

from rich.console import Console

from recipes.actors.actor import Actor
from recipes.actors.launch import launch_actor
from recipes.data.chat_style import chat_style
from recipes.environments.base import heldout_problems
from recipes.environments.task_check import CheckedTask, check_pool
from recipes.evaluation.eval_sets import EvalSet
from recipes.evaluation.evaluation_options import MAIN_SET, EvaluationOptions
from recipes.evaluation.measure import Evaluation
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.reward_options import RewardOptions
from recipes.run.display import SFT_COLUMNS, Display
from recipes.run.ledger import Ledger
from recipes.run.opening import open_folder
from recipes.run.tracking import Tracker
from recipes.settings.options import flatten
from recipes.settings.sft_options import SftOptions, run_options
from recipes.trainers.base import Learner
from recipes.trainers.model import load_trainer
from recipes.trainers.routing_options import check_routers
from recipes.tuning.heldout_measure import Asked
from recipes.tuning.sft_run import SftRun
from recipes.tuning.sft_task import SftTask, read_task
from recipes.world import World, open_world
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, load_tokenizer


def open_sft(options: SftOptions, ledger: Ledger) -> SftRun:
    """Load everything the options name, with the other processes of the run if there are any.

    The task is checked against tokenizer and context before any weight is read."""
    tokenizer = load_tokenizer(options.model)
    checkpoint = read_checkpoint(options.model, options.load_format, options.seed)
    check_routers(options.routing, checkpoint.hf_config)
    task = read_task(options, tokenizer, checkpoint.context_length)
    same, placement = run_options(options), options.placement
    with ExitStack() as on_failure:
        world = open_world(
            device=options.device,
            needs_group=placement.trainer != "plain",
            colocated=placement.rollout_gpus == 0,
        )
        on_failure.callback(world.close)
        # Without a task to ask it still says the dtype in which the weights are served.
        actor = launch_actor(same, world)
        on_failure.callback(actor.close)
        run = assemble_sft(
            options,
            ledger,
            task=task,
            actor=actor,
            tokenizer=tokenizer,
            trainer=load_trainer(same, actor, world),
            world=world,
        )
        on_failure.pop_all()
    return run


def assemble_sft(
    options: SftOptions,
    ledger: Ledger,
    *,
    task: SftTask,
    actor: Actor,
    tokenizer: Tokenizer,
    trainer: Learner,
    world: World | None = None,
) -> SftRun:
    """A run of these parts, whatever task and model the options name."""
    world = world or World()
    asked = None
    if task.asked is not None:
        asked = _asked(options, task.asked, actor, tokenizer, world)
    folder = open_folder(run_options(options), world)
    folder.write_config(flatten(options))
    console = None if world.is_main else Console(quiet=True)
    steps = -(-task.num // options.batch_size)
    return SftRun(
        options=options,
        task=task,
        asked=asked,
        tokenizer=tokenizer,
        actor=actor,
        trainer=trainer,
        world=world,
        folder=folder,
        ledger=ledger,
        display=Display(f"{task.name} -> {folder.path}", steps, console, columns=SFT_COLUMNS),
        tracker=Tracker(options.wandb if world.is_main else "off", folder.path, flatten(options)),
    )


def _asked(
    options: SftOptions, task: CheckedTask, actor: Actor, tokenizer: Tokenizer, world: World
) -> Asked:
    environment = task.environment
    max_new_tokens = options.max_new_tokens or environment.max_new_tokens
    check_pool(task, actor.state(), max_new_tokens)
    style = chat_style(options.data, tokenizer.chat_template)
    grading = open_grading(RewardOptions(), environment, (), processes_here=world.size)
    problems = heldout_problems(environment, options.eval_prompts)
    heldout = EvalSet(name=MAIN_SET, environment=environment, problems=tuple(problems))
    evaluation = Evaluation(
        [heldout],
        EvaluationOptions(),
        tokenizer=tokenizer,
        eos_ids=actor.state().eos_ids,
        max_new_tokens=max_new_tokens,
        style=style,
        gradings={MAIN_SET: grading},
        world=world,
    )
    return Asked(actor=actor, evaluation=evaluation, grading=grading)
