"""Replies to be graded, for tests of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recipes.rewards.base import Failed, Grade, Item
from recipes.types import Problem

SUM = Problem(question="2+2=", answer="4", key="2+2", columns={"level": 3})


def item(reply: str, problem: Problem = SUM) -> Item:
    messages = [{"role": "user", "content": problem.question}]
    ids = np.arange(len(reply), dtype=np.int32)
    return Item(problem=problem, messages=messages, reply=reply, reply_ids=ids)


def items(replies: Sequence[str], problems: Sequence[Problem] | None = None) -> list[Item]:
    pairs = zip(replies, problems or [SUM] * len(replies), strict=True)
    return [item(*pair) for pair in pairs]


def kinds(grades: Sequence[Grade]) -> list[Any]:
    """The rewards, and the kinds of failures in their places."""
    return [grade.kind if isinstance(grade, Failed) else grade for grade in grades]


def told_by_deadline(grade: Callable[[float], list[Grade]]) -> list[Grade]:
    """`grade(timeout_s)` at the first deadline by which all were answered: how long a service needs
    for that depends on what else the machine does."""
    for timeout_s in (0.5, 2.0, 8.0, 32.0):
        found = grade(timeout_s)
        if "timeout" not in kinds(found):
            break
    return found
