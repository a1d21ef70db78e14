"""The interface of a reward: replies in, a number or a failure out for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.protocol import IntArray
from recipes.types import Message, Problem

FailureKind = Literal[
    "timeout",
    "died",
    "raised",
    "memory",
    "not_finite",
    "not_a_number",
    "http",
    "unparsable",
    "too_long",
]
"""Why a reply has no reward: its grader took too long, its process ended, it raised, it asked for
too much memory, it gave NaN or an infinity, it gave no number at all; a service could not be
reached or refused; what a service said cannot be read; chat and reply are longer than a reward
model reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One reply to be graded.

    messages: the chat that asked the problem. reply: its text, without the token that ended it.
    reply_ids: int32 [reply_len], as it was sampled.
    """

    problem: Problem
    messages: Sequence[Message]
    reply: str
    reply_ids: IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A reply that could not be graded. It is masked: it has no part in its group's statistics nor
    in the loss. reason: one line for a person."""

    kind: FailureKind
    reason: str

    def __str__(self) -> str:
        """As `Trajectory.failed` has it; the kind is the text before the first colon."""
        return f"{self.kind}: {self.reason}"


Grade = float | Failed
"""What became of one reply: its reward, 1.0 for a right one, or why it has none."""


class Reward(Protocol):
    """Grades replies; a run has one, or a sum of several."""

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """One grade an item, in order. Whatever goes wrong with one reply is a `Failed` of that
        reply alone; only a reward that cannot work at all raises, a `SlipstreamError`."""
        ...

    async def close(self) -> None:
        """End processes and connections. Idempotent; a `grade` under way ends by an error."""
        ...


LARGEST = 1e15
"""A reward beyond it is an infinity to what learns: float32, where the squares of a step's rewards
are added up."""


def as_grade(value: object) -> Grade:
    """The grade that a reward's return value stands for: a finite number, a truth value, or what
    `float` makes one of, texts left out. No further from 0 than `LARGEST`."""
    if not hasattr(value, "__float__"):
        return Failed(kind="not_a_number", reason=f"gave {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError) as error:
        return Failed(kind="not_a_number", reason=f"gave {type(value).__name__}: {error}")
    if not math.isfinite(number):
        return Failed(kind="not_finite", reason=f"gave {number}")
    if abs(number) > LARGEST:
        reason = f"gave {number:g}, and float32 learns from nothing beyond {LARGEST:g}"
        return Failed(kind="not_finite", reason=reason)
    return number
