"""The interface of a task, and how problems are drawn and divided.

A problem is held out or for training by a hash of its canonical key, so the two sets are disjoint
by construction, whatever the seed and however many are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Literal, Protocol, runtime_checkable

from engine.errors import InvalidRequest
from recipes.rewards.graders.worker import GraderSpec
from recipes.rewards.programs.tested import Tested
from recipes.types import Message, Problem

Split = Literal["train", "heldout"]

MAX_DRAWS = 10_000
"""Draws in a row without a new problem of the wanted split, before the task counts as empty."""


class Environment(Protocol):
    """A task: problems by index, a prompt for each, a reward for a reply."""

    @property
    def name(self) -> str:
        """What it is called in a run folder."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Reply length this task needs, unless the user says otherwise."""
        ...

    @property
    def heldout_one_in(self) -> int:
        """One key in so many is held out."""
        ...

    def draw(self, rng: random.Random) -> Problem:
        """Any problem of the task, of either split."""
        ...

    def messages(self, problem: Problem) -> list[Message]:
        """The chat that asks the problem, worked examples first."""
        ...

    def verify(self, reply: str, problem: Problem) -> float:
        """Reward of a reply, 1.0 for a right one."""
        ...


@runtime_checkable
class GradedBeside(Protocol):
    """A task whose grader may take forever or crash: it runs in processes of its own, and `verify`
    is for a single call."""

    @property
    def grader(self) -> GraderSpec:
        """The function that grades."""
        ...

    def grading(self, reply: str, problem: Problem) -> tuple[str, ...]:
        """Its arguments for a reply."""
        ...


@runtime_checkable
class OwnSplits(Protocol):
    """A task that has all its problems in a list a split, as a file has; draws are of the list."""

    def count(self, split: Split) -> int:
        """Problems of a split."""
        ...

    def at(self, split: Split, index: int) -> Problem:
        """One of them."""
        ...


@runtime_checkable
class GradedByCode(Protocol):
    """A task whose replies are run: a reply is right if its program passes its tests, and `verify`
    is for a single call."""

    def tested(self, reply: str, problem: Problem) -> Tested:
        """The program of a reply and its tests."""
        ...


def key_digest(key: str) -> int:
    """64 bits of a canonical key, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def split_of(key: str, heldout_one_in: int) -> Split:
    """The split a canonical key belongs to, on every machine and in every run."""
    return "heldout" if key_digest(key) % heldout_one_in == 0 else "train"


def problem_at(environment: Environment, split: Split, seed: int, index: int) -> Problem:
    """The problem at a position of the endless stream of a split: a function of its arguments.

    Raises InvalidRequest (`task`) for a split that holds none."""
    rng = random.Random(f"{environment.name}/{split}/{seed}/{index}")
    if isinstance(environment, OwnSplits) and environment.count(split):
        return environment.at(split, rng.randrange(environment.count(split)))
    for _ in range(0 if isinstance(environment, OwnSplits) else MAX_DRAWS):
        problem = environment.draw(rng)
        if split_of(problem.key, environment.heldout_one_in) == split:
            return problem
    raise InvalidRequest(
        f"task: {environment.name} has no {split} problem in {MAX_DRAWS} draws; a run needs "
        "problems to train on and held-out ones, so take a task with more different problems",
        field="task",
    )


def heldout_problems(environment: Environment, num: int) -> list[Problem]:
    """Up to `num` held-out problems with different keys; fewer where the task has no more.

    They depend on the task alone, so that every run and seed is measured on the same set.
    """
    return list(_distinct(environment, num))


def _distinct(environment: Environment, num: int) -> Iterator[Problem]:
    rng = random.Random(f"{environment.name}/heldout")
    seen: set[str] = set()
    misses = 0
    if isinstance(environment, OwnSplits):
        yield from _of_list(environment, rng, num)
        return
    while len(seen) < num and misses < MAX_DRAWS:
        problem = environment.draw(rng)
        is_heldout = split_of(problem.key, environment.heldout_one_in) == "heldout"
        if not is_heldout or problem.key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(problem.key)
        yield problem


def _of_list(environment: OwnSplits, rng: random.Random, num: int) -> Iterator[Problem]:
    there = environment.count("heldout")
    seen: set[str] = set()
    for index in rng.sample(range(there), there):
        problem = environment.at("heldout", index)
        if len(seen) < num and problem.key not in seen:
            seen.add(problem.key)
            yield problem
