"""A task is looked at once, before a model is loaded: every prompt fits, and both splits hold some.

What is found here would else end a run in the middle of a step, without a line number.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import ReplicaState
from recipes.collecting.prompts import Prompts
from recipes.environments.base import Environment, heldout_problems, problem_at, split_of
from recipes.environments.jsonl import JsonLines, Numbered
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
    if isinstance(environment, JsonLines):
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


def check_pool(
    task: CheckedTask, state: ReplicaState, max_new_tokens: int, *, option: str = "kv_memory_gb"
) -> None:
    """Once the engine is there: its KV cache holds the longest prompt with the longest reply.

    option: that sizes the cache. Raises InvalidRequest naming it.
    """
    room = state.total_pages * state.page_size
    wanted = min(task.longest + max_new_tokens, state.context_length)
    if wanted > room:
        raise InvalidRequest(
            f"{option}: the prompt at {task.where} ({task.longest} tokens) and a reply of "
            f"{max_new_tokens} do not fit into a KV cache of {room} tokens; raise "
            f"--{option.replace('_', '-')} or lower --max-new-tokens",
            field=option,
        )


def _check_file(
    environment: JsonLines, prompts: Prompts, context_length: int, skip_long: bool
) -> CheckedTask:
    lengths = [
        _num_tokens(prompts, line.problem, f"{environment.path}:{line.number}")
        for line in environment.lines
    ]
    long = [i for i, num_tokens in enumerate(lengths) if num_tokens >= context_length]
    if long:
        told = _told_long(environment, long, lengths, context_length)
        if not skip_long:
            raise ContextTooLong(
                f"task: {told}; shorten them, or leave them out with --skip-long-prompts",
                field="task",
            )
        logger.warning("task: %s; left out", told)
    left_out = set(long)
    kept = [i for i in range(len(lengths)) if i not in left_out]
    _check_splits(environment, [environment.lines[i] for i in kept])
    longest = max(kept, key=lengths.__getitem__)
    return CheckedTask(
        environment=dataclasses.replace(
            environment, lines=tuple(environment.lines[i] for i in kept)
        ),
        longest=lengths[longest],
        where=f"{environment.path}:{environment.lines[longest].number}",
    )


def _told_long(
    environment: JsonLines, long: list[int], lengths: list[int], context_length: int
) -> str:
    places = ", ".join(
        f"{environment.path}:{environment.lines[i].number} ({lengths[i]} tokens)"
        for i in long[:SHOWN]
    )
    more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    return f"a context of {context_length} tokens has no room for the prompts at {places}{more}"


def _check_splits(environment: JsonLines, lines: list[Numbered]) -> None:
    keys = {line.problem.key for line in lines}
    num_heldout = sum(split_of(key, environment.heldout_one_in) == "heldout" for key in keys)
    num_train = len(keys) - num_heldout
    if num_heldout == 0 or num_train == 0:
        raise InvalidRequest(
            f"task: {environment.path} has {len(keys)} different prompts that fit, {num_train} to "
            f"train on and {num_heldout} held out; a run needs both, so add lines (about one "
            f"prompt in {environment.heldout_one_in} is held out, by a hash of its text)",
            field="task",
        )


def _num_tokens(prompts: Prompts, problem: Problem, where: str) -> int:
    num_tokens = len(prompts.prompt_ids(problem))
    if num_tokens == 0:
        raise InvalidRequest(
            f"task: the prompt at {where} has no tokens for this model; write one", field="task"
        )
    return num_tokens
