"""A user's own Python function as a reward: `--reward my_reward.py:score`.

The function asks by name for what it wants of a reply, and gives a number; it may be `async`. It
runs beside the run, as graders do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from recipes.rewards.base import Grade, Item
from recipes.rewards.graders.grader_main import GraderLimits
from recipes.rewards.graders.pool import GraderCall, GraderPool
from recipes.rewards.graders.worker import GraderSpec
from recipes.types import Problem

MEMORY_BYTES = 8 << 30
"""Most memory of one process beyond what its imports took."""


class UserFunction:
    """A `Reward`. Made, it has loaded the function once.

    function: "FILE.py:function" or "module:function". problems: some of the task's; the names of
    their columns are those that the function may ask for. timeout_s: of the clock, for one reply.
    Raises InvalidRequest (`reward`) for a function that cannot be loaded, or that needs what
    nobody has.
    """

    def __init__(
        self, function: str, problems: Sequence[Problem], *, timeout_s: float, num_processes: int
    ) -> None:
        limits = GraderLimits(cpu_s=None, wall_s=timeout_s, memory_bytes=MEMORY_BYTES)
        spec = GraderSpec(function=_absolute(function), field="reward")
        self._pool = GraderPool(spec, num_processes=num_processes, limits=limits)
        try:
            self._pool.start()
            self._parameters = self._pool.parameters()
            columns = {name for problem in problems for name in problem.columns}
            _check_required(function, self._parameters.required, {*OFFERED, *columns})
        except BaseException:
            self._pool.end()
            raise

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`."""
        return await self._pool.grade([GraderCall(keywords=self._asked(item)) for item in items])

    async def close(self) -> None:
        """See `Reward`."""
        await self._pool.close()

    def _asked(self, item: Item) -> dict[str, Any]:
        offered = keywords(item)
        if self._parameters.takes_any:
            return offered
        return {name: offered[name] for name in offered if name in self._parameters.known}


OFFERED = (
    *("prompt", "question", "answer", "reply", "completion", "messages", "columns"),
    "num_tokens",
)
"""What every item has for a function, beside each column of the problem by its name."""


def keywords(item: Item) -> dict[str, Any]:
    """What a function may ask for, by name; a column does not hide a name of `OFFERED`."""
    problem = item.problem
    return {
        **problem.columns,
        "prompt": problem.question,
        "question": problem.question,
        "answer": problem.answer,
        "reply": item.reply,
        "completion": item.reply,
        "messages": list(item.messages),
        "columns": problem.columns,
        "num_tokens": len(item.reply_ids),
    }


def _absolute(function: str) -> str:
    place, _, name = function.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else function


def _check_required(function: str, required: frozenset[str], names: set[str]) -> None:
    missing = sorted(required - names)
    if missing:
        raise InvalidRequest(
            f"reward: {function} asks for {', '.join(missing)}, and a reply of this task has "
            f"{', '.join(sorted(names))}; give the parameter a default, or rename it",
            field="reward",
        )
