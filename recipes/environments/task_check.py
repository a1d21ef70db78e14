"""A task is looked at once, before a model is loaded: every prompt fits, and both splits hold some.

What is found here would else end a run in the middle of a step, without a line number.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import ReplicaState
from recipes.collecting.prompts import Prompts
from recipes.data.rows import Place
from recipes.environments.base import Environment, Split, heldout_problems, problem_at
from recipes.environments.file_task import FileTask
from recipes.types import Problem

logger = logging.getLogger(__name__)

SHOWN = 3
"""Lines that are named, of those too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTask:
    """A task whose prompts fit. longest: tokens of the longest prompt looked at, at `where`."""

    environment: Environment
    longest: int
    where: str


def check_task(
    environment: Environment,
    prompts: Prompts,
    *,
    context_length: int,
    num_heldout: int,
    skip_long: bool = False,
) -> CheckedTask:
    """Tokenise the prompts and look into the splits.

    prompts: of this task and of the model's tokenizer. context_length: tokens that the engine will
    serve, prompt and reply together. num_heldout: problems of an evaluation. skip_long: leave the
    prompts out that do not fit. Of a file, every line is looked at; of a generated task, the
    held-out problems and the first of training.

    Raises ContextTooLong naming the lines that do not fit, and InvalidRequest for a prompt without
    tokens or a split without problems.
    """
    if isinstance(environment, FileTask):
        return _check_file(environment, prompts, context_length, skip_long)
    heldout = heldout_problems(environment, num_heldout)
    if not heldout:
        raise InvalidRequest(f"task: {environment.name} has no held-out problem", field="task")
    longest = 0
    for problem in (*heldout, problem_at(environment, "train", 0, 0)):
        num_tokens = _num_tokens(prompts, problem, environment.name)
        longest = max(longest, num_tokens)
    if longest >= context_length:
        raise ContextTooLong(
            f"task: {environment.name} has a prompt of {longest} tokens, which a context of "
            f"{context_length} has no room for; take a model with a longer context",
            field="task",
        )
    return CheckedTask(environment=environment, longest=longest, where=environment.name)


def check_pool(task: CheckedTask, state: ReplicaState, max_new_tokens: int) -> None:
    """Once the engine is there: its KV cache holds the longest prompt with the longest reply.

    Raises InvalidRequest naming `kv_memory_gb`.
    """
    room = state.total_pages * state.page_size
    wanted = min(task.longest + max_new_tokens, state.context_length)
    if wanted > room:
        raise InvalidRequest(
            f"kv_memory_gb: the prompt at {task.where} ({task.longest} tokens) and a reply of "
            f"{max_new_tokens} do not fit into a KV cache of {room} tokens; raise "
            "--kv-memory-gb or lower --max-new-tokens",
            field="kv_memory_gb",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """The tokens of each prompt of a task from a file, in the order of its splits."""

    task: FileTask
    lengths: dict[Split, list[int]]

    def longer(self, context_length: int) -> dict[Split, list[int]]:
        """Indices of the prompts that leave no room for a token."""
        return {
            split: [i for i, length in enumerate(lengths) if length >= context_length]
            for split, lengths in self.lengths.items()
        }

    def longest_below(self, context_length: int) -> tuple[int, Place]:
        """Tokens and place of the longest prompt that leaves room."""
        found = (
            (length, split, index)
            for split, lengths in self.lengths.items()
            for index, length in enumerate(lengths)
            if length < context_length
        )
        length, split, index = max(found, key=lambda item: item[0])
        return length, self.task.place(split, index)


def _check_file(
    environment: FileTask, prompts: Prompts, context_length: int, skip_long: bool
) -> CheckedTask:
    measured = _measure(environment, prompts)
    long = measured.longer(context_length)
    if any(long.values()):
        told = _told_long(measured, long, context_length)
        if not skip_long:
            raise ContextTooLong(
                f"task: {told}; shorten them, or leave them out with --skip-long-prompts",
                field="task",
            )
        logger.warning("task: %s; left out", told)
    kept = environment.without(long)
    _check_splits(kept)
    longest, place = measured.longest_below(context_length)
    return CheckedTask(environment=kept, longest=longest, where=str(place))


def _measure(environment: FileTask, prompts: Prompts) -> _Measured:
    lengths: dict[Split, list[int]] = {
        split: [
            _num_tokens(prompts, environment.at(split, index), environment.place(split, index))
            for index in range(environment.count(split))
        ]
        for split in environment.splits
    }
    return _Measured(task=environment, lengths=lengths)


def _told_long(measured: _Measured, long: dict[Split, list[int]], context_length: int) -> str:
    found = sorted(
        (measured.task.place(split, index), measured.lengths[split][index])
        for split, indices in long.items()
        for index in indices
    )
    places = ", ".join(f"{place} ({num_tokens} tokens)" for place, num_tokens in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"a context of {context_length} tokens has no room for the prompts at {places}{more}"


def _check_splits(task: FileTask) -> None:
    num_train, num_heldout = task.num_different("train"), task.num_different("heldout")
    if num_train and num_heldout:
        return
    how = "so add rows"
    if task.heldout_one_in:
        how += f" (one prompt in {task.heldout_one_in} is held out, by a hash of its text)"
    raise InvalidRequest(
        f"task: {task.path} has {num_train + num_heldout} different prompts that fit, {num_train} "
        f"to train on and {num_heldout} held out; a run needs both, {how}",
        field="task",
    )


def _num_tokens(prompts: Prompts, problem: Problem, where: Place | str) -> int:
    """Raises InvalidRequest naming the place of a prompt that the chat template refuses."""
    try:
        num_tokens = len(prompts.prompt_ids(problem))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"task: the prompt at {where}: {error.message}", field=error.field or "task"
        ) from error
    if num_tokens == 0:
        raise InvalidRequest(
            f"task: the prompt at {where} has no tokens for this model; write one", field="task"
        )
    return num_tokens
