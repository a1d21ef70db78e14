"""Evaluate a model on named sets of problems, without training it.

    python recipes/evaluate.py --model runs/X/model --eval-set sums=addition --eval-samples 8
    torchrun --nproc-per-node 4 recipes/evaluate.py --model M --eval-set math=FILE.jsonl

The figures are those of a training run (`recipes/evaluation/`), with the same replies and graded
alike: a table on stderr, and JSON on stdout or in the file that --out names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from engine.config import CacheConfig, Device, DType, EngineConfig, LoadFormat, ParallelConfig
from engine.errors import InvalidRequest
from recipes.actors.actor import InlineActor
from recipes.data.chat_style import chat_style
from recipes.data.data_options import ColumnOptions, DataOptions
from recipes.environments.named_tasks import is_file_task
from recipes.environments.task_check import check_pool
from recipes.evaluation.eval_sets import CheckedSet, graded_as_run, read_sets
from recipes.evaluation.eval_table import by_set, table
from recipes.evaluation.evaluation_options import EvaluationOptions, check_evaluation, named_tasks
from recipes.evaluation.measure import Evaluation
from recipes.rewards.grading import Grading
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.programs.code_options import CodeOptions
from recipes.rewards.reward_models.open_reward_model import open_reward_model
from recipes.rewards.reward_models.reward_model_options import RewardModelOptions
from recipes.rewards.reward_options import GraderOptions, check_reward_options
from recipes.run.failures import report_failure
from recipes.settings.checks import check_model, check_numbers
from recipes.settings.command_line import joined
from recipes.settings.idle import check_idle_evaluation
from recipes.settings.options import flatten
from recipes.world import World, launched_rank, leave, open_world
from rollout.launch import launch, read_checkpoint
from rollout.offline import check_output, load_tokenizer, replace_file


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate a language model: greedy accuracy, avg@k and pass@k on named sets."""

    model: str
    """Hugging Face folder, GGUF file, or a config.json (with --load-format random)."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when torch sees one."""
    dtype: DType = "auto"
    """What the engine computes in."""
    eval_prompts: int = 256
    """Most problems of a set."""
    max_new_tokens: int | None = None
    """Longest reply in tokens; None takes each task's own."""
    kv_memory_gb: float = 1.0
    """Memory of the engine's KV cache, GiB."""
    skip_long_prompts: bool = False
    """Leave out the prompts that do not fit into the model's context, instead of refusing."""
    out: str | None = None
    """File for the figures, JSON; None writes them to stdout."""
    data: tyro.conf.OmitArgPrefixes[ColumnOptions] = field(default_factory=ColumnOptions)
    evaluation: tyro.conf.OmitArgPrefixes[EvaluationOptions] = field(
        default_factory=EvaluationOptions
    )
    rewards: tyro.conf.OmitArgPrefixes[GraderOptions] = field(default_factory=GraderOptions)
    code: tyro.conf.OmitArgPrefixes[CodeOptions] = field(default_factory=CodeOptions)
    reward_model: tyro.conf.OmitArgPrefixes[RewardModelOptions] = field(
        default_factory=RewardModelOptions
    )


def evaluate(options: EvaluateOptions) -> dict[str, dict[str, float]]:
    """The figures of each set by its name; with the other processes, if torchrun started some."""
    tokenizer = load_tokenizer(options.model)
    checkpoint = read_checkpoint(options.model, options.load_format)
    data = DataOptions(**dataclasses.asdict(options.data))
    checked = read_sets(
        options.evaluation.eval_set,
        data,
        tokenizer,
        trained=None,
        context_length=checkpoint.context_length,
        num_problems=options.eval_prompts,
        skip_long=options.skip_long_prompts,
        needs_answer=options.rewards.uses_task,
    )
    with ExitStack() as at_end:
        world = open_world(device=options.device, needs_group=False, colocated=True)
        at_end.callback(world.close)
        gradings = _gradings(options, checked, world)
        for grading in gradings.values():
            at_end.callback(grading.close)
        config = EngineConfig(
            model=options.model,
            load_format=options.load_format,
            device=options.device,
            dtype=options.dtype,
            cache=CacheConfig(memory_bytes=int(options.kv_memory_gb * 2**30)),
            parallel=ParallelConfig(base_gpu=world.local_rank),
        )
        actor = InlineActor(launch(config))
        at_end.callback(actor.close)
        for each in checked:
            longest = options.max_new_tokens or each.eval_set.environment.max_new_tokens
            check_pool(each.longest, actor.state(), longest)
        evaluation = Evaluation(
            [each.eval_set for each in checked],
            options.evaluation,
            tokenizer=tokenizer,
            eos_ids=actor.state().eos_ids,
            max_new_tokens=options.max_new_tokens,
            style=chat_style(data, tokenizer.chat_template),
            gradings=gradings,
            code=options.code,
            world=world,
        )
        figures = evaluation.measure(actor)
    return {
        each.name: {"num_problems": float(len(each.problems)), **by_set(figures)[each.name]}
        for each in evaluation.sets
    }


def _gradings(
    options: EvaluateOptions, checked: Sequence[CheckedSet], world: World
) -> dict[str, Grading]:
    """The one grading of all sets that --reward grades, by the name of each; others have theirs."""
    sets = [each.eval_set for each in checked]
    graded = [s for s in sets if graded_as_run(options.rewards, None, s.environment)]
    if not graded:
        return {}
    grading = open_grading(
        options.rewards,
        graded[0].environment,
        [problem for each in graded for problem in each.problems],
        processes_here=world.size,
        code=options.code,
        open_model=functools.partial(open_reward_model, options=options, world=world),
    )
    return {each.name: grading for each in graded}


def _rewarded(options: EvaluateOptions) -> frozenset[str]:
    """Names of the sets whose accuracy is a mean reward, no share of right answers."""
    tasks = named_tasks(options.evaluation.eval_set)
    if options.rewards.measures_accuracy:
        return frozenset()
    return frozenset(name for name, task in tasks.items() if is_file_task(task))


def parse(argv: Sequence[str]) -> EvaluateOptions:
    """Options of a command line. Raises InvalidRequest or ModelNotFound naming the option."""
    options = tyro.cli(EvaluateOptions, args=joined(argv, "--reward"), prog="evaluate.py")
    check_numbers(flatten(options))
    check_evaluation(options.evaluation)
    check_reward_options(options.rewards)
    if not options.evaluation.eval_set:
        raise InvalidRequest(
            "eval_set: nothing to evaluate on; give --eval-set NAME=TASK", field="eval_set"
        )
    check_idle_evaluation(options, EvaluateOptions(model=options.model))
    if options.out is not None:
        check_output(options.model, options.out, field="out")
    check_model(options.model)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: not 0 after an error, explained in a line."""
    level = logging.WARNING if launched_rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        sets = evaluate(options)
        if launched_rank() == 0:
            text = f"{json.dumps({'model': options.model, 'sets': sets}, indent=2)}\n"
            Console(stderr=True).print(table(sets, _rewarded(options)))
            if options.out is None:
                sys.stdout.write(text)
            else:
                replace_file(Path(options.out), text.encode())
    except (Exception, KeyboardInterrupt) as error:
        code = report_failure(error, None)
        if code is None:
            raise
        return code
    return 0


if __name__ == "__main__":
    # Spawned engines inherit the path, where `types` of this folder would hide Python's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    leave(main())
