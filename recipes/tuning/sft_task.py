"""What a supervised run learns and is measured on, looked at before any weight is read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ContextTooLong, InvalidRequest
from recipes.collecting.prompts import Prompts
from recipes.data.chat_style import ChatStyle, chat_style
from recipes.data.rows import Place
from recipes.environments.base import Environment, Split, heldout_problems
from recipes.environments.file_task import FileTask, load_rows
from recipes.environments.named_tasks import is_file_task, select_environment
from recipes.environments.task_check import CheckedTask, check_task
from recipes.settings.sft_options import SftOptions
from recipes.tuning.conversations import conversation, find_conversations
from recipes.tuning.example_stream import DrawnExamples, Examples, ShuffledExamples, num_examples
from recipes.tuning.examples import Example, ExampleWriter
from rollout.offline import Tokenizer

logger = logging.getLogger(__name__)

SHOWN = 3
"""Rows that are named, of those too long."""


@dataclass(frozen=True, kw_only=True)
class SftTask:
    """examples: those to learn, `num` of them in the whole run. heldout: those whose loss is
    measured. asked: the task whose held-out problems are answered, or None."""

    name: str
    examples: Examples
    num: int
    heldout: list[Example]
    asked: CheckedTask | None


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """What is needed to read a task."""

    options: SftOptions
    tokenizer: Tokenizer
    style: ChatStyle
    context_length: int

    @property
    def writer(self) -> ExampleWriter:
        return ExampleWriter(
            tokenizer=self.tokenizer, style=self.style, train_on=self.options.data.train_on
        )


def read_task(options: SftOptions, tokenizer: Tokenizer, context_length: int) -> SftTask:
    """Read, write and check every conversation of a file, or the held-out ones of another task.

    Raises InvalidRequest or ContextTooLong naming the option, and the row where it is one."""
    data = options.data
    style = chat_style(data, tokenizer.chat_template)
    reader = _Reader(
        options=options, tokenizer=tokenizer, style=style, context_length=context_length
    )
    if not reader.writer.ends_turns():
        logger.warning(
            "the chat template ends the assistant's turn with no token that ends a reply of this "
            "model: replies will run on to --max-new-tokens, unless its config names that token"
        )
    if is_file_task(options.task):
        return _read_file(reader)
    environment = select_environment(options.task)
    _refuse_of_files(options)
    asked = _asked(reader, options.eval_task or options.task)
    heldout = heldout_problems(environment, options.eval_prompts)
    return SftTask(
        name=environment.name,
        examples=DrawnExamples(environment, reader.writer, options.seed),
        num=num_examples(options, None),
        heldout=[reader.writer.example(conversation(environment, p)) for p in heldout],
        asked=asked,
    )


def _read_file(reader: _Reader) -> SftTask:
    options = reader.options
    find = functools.partial(find_conversations, options.data)
    task = load_rows(
        Path(options.task),
        find,
        train_split=options.data.train_split,
        heldout=options.data.heldout,
    )
    train = _fitting(reader, task, "train", range(task.count("train")))
    heldout = _fitting(reader, task, "heldout", range(task.count("heldout")))
    if not train or not heldout:
        raise InvalidRequest(
            f"task: {options.task} has {len(train)} conversations to train on and {len(heldout)} "
            "held out that fit; a run needs both, so add rows, or choose --heldout",
            field="task",
        )
    return SftTask(
        name=task.name,
        examples=ShuffledExamples(train, options.seed),
        num=num_examples(options, len(train)),
        heldout=heldout[: options.eval_prompts],
        asked=None if options.eval_task is None else _asked(reader, options.eval_task),
    )


def _fitting(
    reader: _Reader, task: FileTask, split: Split, indices: Sequence[int]
) -> list[Example]:
    """The conversations of a split as tokens, less those that do not fit."""
    writer, examples = reader.writer, []
    long: list[tuple[Place, int]] = []
    for index in indices:
        place = task.place(split, index)
        try:
            example = writer.example(conversation(task, task.at(split, index)))
        except InvalidRequest as error:
            field = error.field or "task"
            raise InvalidRequest(
                f"task: the conversation at {place}: {error.message}", field=field
            ) from error
        if len(example.token_ids) > reader.context_length:
            long.append((place, len(example.token_ids)))
        else:
            examples.append(example)
    if long:
        _tell_long(reader, long)
    return examples


def _tell_long(reader: _Reader, long: Sequence[tuple[Place, int]]) -> None:
    places = ", ".join(f"{place} ({num} tokens)" for place, num in long[:SHOWN])
    more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    told = (
        f"a context of {reader.context_length} tokens has no room for the conversations at "
        f"{places}{more}"
    )
    if not reader.options.skip_long_prompts:
        raise ContextTooLong(
            f"task: {told}; shorten them, or leave them out with --skip-long-prompts", field="task"
        )
    logger.warning("task: %s; left out", told)


def _asked(reader: _Reader, name: str) -> CheckedTask:
    environment: Environment = select_environment(name)
    return check_task(
        environment,
        Prompts(environment, reader.tokenizer, (), reader.style),
        context_length=reader.context_length,
        num_heldout=reader.options.eval_prompts,
        skip_long=reader.options.skip_long_prompts,
    )


def _refuse_of_files(options: SftOptions) -> None:
    """Options that say nothing to a task which makes its problems without end."""
    data = options.data
    given = {
        "epochs": options.epochs,
        "prompt_column": data.prompt_column,
        "completion_column": data.completion_column,
        "train_split": data.train_split,
        "heldout": data.heldout,
    }
    for name, value in given.items():
        if value is not None:
            raise InvalidRequest(
                f"{name}: --{name.replace('_', '-')} speaks of a file or folder, which the task "
                f"{options.task} is not; leave it out",
                field=name,
            )
