"""The sets of problems that a run is measured on, read and looked at before a model is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ContextTooLong, InvalidRequest, SlipstreamError
from recipes.collecting.prompts import Prompts, PromptTokenizer
from recipes.environments.base import Environment, heldout_problems, split_of
from recipes.environments.jsonl import JsonLines
from recipes.environments.named_tasks import select_environment
from recipes.environments.task_check import CheckedTask
from recipes.evaluation.evaluation_options import named_tasks
from recipes.types import Problem

logger = logging.getLogger(__name__)

SHOWN_CHARS = 80


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Problems of one task. name: in figures, `eval/<name>/...`."""

    name: str
    environment: Environment
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True)
class CheckedSet:
    """A set whose prompts fit into the context; longest: the longest prompt."""

    eval_set: EvalSet
    longest: CheckedTask


def read_sets(
    words: tuple[str, ...],
    tokenizer: PromptTokenizer,
    *,
    trained: Environment | None,
    context_length: int,
    num_problems: int,
    skip_long: bool = False,
) -> list[CheckedSet]:
    """The sets that the words NAME=TASK name.

    trained: the task of the run, if it has one: of its own file, the problems that are trained on
    are in no set. context_length: tokens the engine will serve, prompt and reply together.
    num_problems: most problems of a set. skip_long: leave out the prompts that do not fit.

    Raises InvalidRequest (`eval_set`) for a task that is unknown, cannot be read or has no
    problem, ContextTooLong for a prompt that does not fit.
    """
    return [
        _read(name, task, tokenizer, trained, context_length, num_problems, skip_long)
        for name, task in named_tasks(words).items()
    ]


def _read(
    name: str,
    task: str,
    tokenizer: PromptTokenizer,
    trained: Environment | None,
    context_length: int,
    num_problems: int,
    skip_long: bool,
) -> CheckedSet:
    try:
        environment = select_environment(task)
    except SlipstreamError as error:
        told = error.message.removeprefix("task: ")
        raise type(error)(f"eval_set: {name}: {told}", field="eval_set") from error
    problems = _problems(environment, trained, num_problems)
    _warn_of_overlap(name, problems, trained)
    prompts = Prompts(environment, tokenizer, ())
    lengths = [len(prompts.prompt_ids(problem)) for problem in problems]
    fitting = [i for i, length in enumerate(lengths) if 0 < length < context_length]
    if len(fitting) < len(problems):
        told = _told_unfit(name, problems, lengths, context_length)
        if not skip_long:
            raise ContextTooLong(f"{told}; leave them out by --skip-long-prompts", field="eval_set")
        logger.warning("%s; left out", told)
    if not fitting:
        raise InvalidRequest(f"eval_set: {name} ({task}) has no problem", field="eval_set")
    longest = max(lengths[i] for i in fitting)
    return CheckedSet(
        eval_set=EvalSet(
            name=name, environment=environment, problems=tuple(problems[i] for i in fitting)
        ),
        longest=CheckedTask(environment=environment, longest=longest, where=f"set {name}"),
    )


def _problems(environment: Environment, trained: Environment | None, num: int) -> list[Problem]:
    """Of a file all, unless it is the one trained on; else those held out."""
    if isinstance(environment, JsonLines) and not _is_same_file(environment, trained):
        environment = dataclasses.replace(environment, heldout_one_in=1)
    return heldout_problems(environment, num)


def _is_same_file(file: JsonLines, trained: Environment | None) -> bool:
    return isinstance(trained, JsonLines) and trained.path.resolve() == file.path.resolve()


def _warn_of_overlap(name: str, problems: Sequence[Problem], trained: Environment | None) -> None:
    """Say so where another file holds problems that the run is trained on."""
    if not isinstance(trained, JsonLines):
        return
    keys = {line.problem.key for line in trained.lines}
    seen = {key for key in keys if split_of(key, trained.heldout_one_in) == "train"}
    num_seen = sum(problem.key in seen for problem in problems)
    if num_seen:
        logger.warning(
            "eval_set: %d of the %d problems of %s are trained on: they are in %s too",
            *(num_seen, len(problems), name, trained.path),
        )


def _told_unfit(
    name: str, problems: Sequence[Problem], lengths: Sequence[int], context_length: int
) -> str:
    unfit = [i for i, length in enumerate(lengths) if not 0 < length < context_length]
    first = problems[unfit[0]].question[:SHOWN_CHARS]
    return (
        f"eval_set: {name} has {len(unfit)} prompts without tokens or without room in a context "
        f"of {context_length}; the first has {lengths[unfit[0]]} and begins {first!r}"
    )
