"""The rewards of a run's replies, by the task itself or by its grader beside the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recipes.environments.base import Environment, GradedBeside
from recipes.rewards.graders import MOST_PROCESSES, GraderPool
from recipes.types import Problem

Grader = Callable[[Sequence[str], Sequence[Problem]], list[float]]
"""Rewards of replies, each to its problem, 1.0 for a right one."""

SHOWN_CHARS = 80


@dataclass(frozen=True, kw_only=True)
class Ungraded:
    """A reply that its grader did not get through; its reward is 0."""

    question: str
    reply: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}: reply {_short(self.reply)} to {_short(self.question)}"


class Grading:
    """A `Grader` of one task; owns the processes, if it has some. processes_here: of the run on
    this host, which share the cores."""

    def __init__(self, environment: Environment, *, processes_here: int = 1) -> None:
        self._environment = environment
        self._pool: GraderPool | None = None
        self._ungraded: list[Ungraded] = []
        if isinstance(environment, GradedBeside):
            share = (os.cpu_count() or 1) // processes_here
            num = max(1, min(share, MOST_PROCESSES))
            self._pool = GraderPool(environment.grader, num_processes=num)

    def __call__(self, replies: Sequence[str], problems: Sequence[Problem]) -> list[float]:
        """The rewards, in order. Raises InvalidRequest for a grader that cannot be loaded."""
        pairs = list(zip(replies, problems, strict=True))
        environment = self._environment
        if self._pool is None or not isinstance(environment, GradedBeside):
            return [environment.verify(reply, problem) for reply, problem in pairs]
        grades = self._pool.grade([environment.grading(*pair) for pair in pairs])
        self._ungraded += [
            Ungraded(question=problem.question, reply=reply, reason=grade.failed)
            for (reply, problem), grade in zip(pairs, grades, strict=True)
            if grade.failed
        ]
        return [grade.reward for grade in grades]

    def take_ungraded(self) -> list[Ungraded]:
        """Those since the last call."""
        taken, self._ungraded = self._ungraded, []
        return taken

    def close(self) -> None:
        """End the processes. Idempotent."""
        if self._pool is not None:
            self._pool.close()


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
