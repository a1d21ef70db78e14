"""The sets of problems that a run is measured on, read and looked at before a model is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ContextTooLong, InvalidRequest, SlipstreamError
from recipes.collecting.prompts import Prompts, PromptTokenizer
from recipes.data.chat_style import chat_style
from recipes.data.data_options import ONLY_OF_FILES, DataOptions
from recipes.data.source import open_source
from recipes.environments.base import Environment, Split, heldout_problems
from recipes.environments.file_task import FileTask
from recipes.environments.named_tasks import check_columns, is_file_task, select_environment
from recipes.environments.task_check import CheckedTask
from recipes.evaluation.evaluation_options import named_tasks
from recipes.rewards.reward_options import GraderOptions
from recipes.types import Problem

logger = logging.getLogger(__name__)

SHOWN_CHARS = 80
TEST_SPLIT = "test"
"""The split of a folder that a set is, where the folder has several."""


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
    data: DataOptions,
    tokenizer: PromptTokenizer,
    *,
    trained: Environment | None,
    context_length: int,
    num_problems: int,
    skip_long: bool = False,
    needs_answer: bool = True,
) -> list[CheckedSet]:
    """The sets that the words NAME=TASK name.

    data: columns and chats of files, as of the task itself; its splits are those of the task alone.
    Of a folder with several splits, `test` is taken. trained: the task of the run, if it has one:
    of its own file or folder, the problems that are trained on are in no set. context_length:
    tokens the engine will serve, prompt and reply together. num_problems: most problems of a set.
    skip_long: leave out the prompts that do not fit.
    needs_answer: whether what grades the sets that are files compares with an answer.

    Raises InvalidRequest (`eval_set`) for a task that is unknown, cannot be read or has no
    problem, ContextTooLong for a prompt that does not fit.
    """
    tasks = named_tasks(words)
    if trained is None and not any(is_file_task(task) for task in tasks.values()):
        check_columns(", ".join(tasks.values()), data)
    return [
        _read(
            *(name, _select(name, task, data, needs_answer), task, data, tokenizer, trained),
            *(context_length, num_problems, skip_long),
        )
        for name, task in tasks.items()
    ]


def graded_as_run(
    rewards: GraderOptions, trained: Environment | None, environment: Environment
) -> bool:
    """Whether what `--reward` says grades the replies to a set.

    trained: the task of the run, whose replies it grades; None where nothing is trained.
    A generated task has a reward of its own, a file has what `--reward` says. The reward `task` of
    a generated task says nothing of a file.
    """
    of_files = bool(rewards.reward) and (trained is None or isinstance(trained, FileTask))
    return isinstance(environment, FileTask) and (of_files or not rewards.uses_task)


def _select(name: str, task: str, data: DataOptions, needs_answer: bool) -> Environment:
    """A set's task, of a file all of it; of the others the columns are not asked for."""
    try:
        return select_environment(task, _of_the_set(task, data), needs_answer=needs_answer)
    except SlipstreamError as error:
        told = error.message.removeprefix("task: ")
        raise type(error)(f"eval_set: {name}: {told}", field="eval_set") from error


def _read(
    name: str,
    environment: Environment,
    task: str,
    data: DataOptions,
    tokenizer: PromptTokenizer,
    trained: Environment | None,
    context_length: int,
    num_problems: int,
    skip_long: bool,
) -> CheckedSet:
    problems = _problems(environment, trained, num_problems)
    _warn_of_overlap(name, problems, trained)
    prompts = Prompts(environment, tokenizer, (), chat_style(data, tokenizer.chat_template))
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


def _of_the_set(task: str, data: DataOptions) -> DataOptions:
    """What the options of the run's data say of another task: of one without a file only how its
    chats are written, of a folder with several splits that the set is its `test`."""
    if not is_file_task(task):
        return dataclasses.replace(data, **dict.fromkeys(ONLY_OF_FILES))
    split = TEST_SPLIT if _has_splits(Path(task)) else None
    if split is not None and split not in (there := open_source(Path(task), field="task").splits):
        raise InvalidRequest(
            f"{task} has the splits {', '.join(there)}, none of which is {split!r}; give the file "
            "or folder of one of them",
            field="task",
        )
    return dataclasses.replace(data, heldout=None, train_split=split)


def _has_splits(path: Path) -> bool:
    return path.is_dir() and len(open_source(path, field="task").splits) > 1


def _problems(environment: Environment, trained: Environment | None, num: int) -> list[Problem]:
    """Of a file all, or all of its folder's split, but for those that a run on it is trained on;
    of another task those held out."""
    if not isinstance(environment, FileTask):
        return heldout_problems(environment, num)
    if not isinstance(trained, FileTask) or not _is_same_file(environment, trained):
        return list(itertools.islice(_different(environment), num))
    if not _has_splits(environment.path):
        return heldout_problems(environment, num)
    keys = {trained.at("train", index).key for index in range(trained.count("train"))}
    untrained = (problem for problem in _different(environment) if problem.key not in keys)
    return list(itertools.islice(untrained, num))


def _different(file: FileTask) -> Iterator[Problem]:
    """The problems of both splits, each once."""
    seen: set[str] = set()
    splits: tuple[Split, ...] = ("heldout", "train")
    for split in splits:
        for index in range(file.count(split)):
            problem = file.at(split, index)
            if problem.key not in seen:
                seen.add(problem.key)
                yield problem


def _is_same_file(file: FileTask, trained: Environment | None) -> bool:
    return isinstance(trained, FileTask) and trained.path.resolve() == file.path.resolve()


def _warn_of_overlap(name: str, problems: Sequence[Problem], trained: Environment | None) -> None:
    """Say so where another file holds problems that the run is trained on."""
    if not isinstance(trained, FileTask):
        return
    keys = {problem.key for problem in problems}
    rows = range(trained.count("train"))
    num_seen = len(keys & {trained.at("train", index).key for index in rows})
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
