"""The reward that a task brings along."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.environments.base import Environment, GradedBeside, GradedByCode
from recipes.rewards.base import Failed, Grade, Item, Reward, as_grade
from recipes.rewards.graders.pool import GraderCall, GraderPool
from recipes.rewards.programs.code import code_reward
from recipes.rewards.programs.code_options import CodeOptions

QUICK_S = 0.15
"""Of processor time, for every reply: mathematics that people write takes a tenth of a second."""
LEAST_SLOW, ONE_SLOW_IN = 4, 16
"""How many replies of a batch have more time: four, or one in sixteen."""


class TaskVerifier:
    """A `Reward`: the task's `verify`, which is cheap and called where it stands."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`."""
        return [as_grade(self._environment.verify(item.reply, item.problem)) for item in items]

    async def close(self) -> None:
        """See `Reward`."""


class TaskGrader:
    """A `Reward`: the grader of a task that runs beside the run. Its processes start at once.

    A reply has `QUICK_S` of processor time. Those that need more have the whole limit of
    `pool.LIMITS` in a second round, as long as they are few: a batch of replies that take for
    ever costs little more than the first round.
    """

    def __init__(self, environment: GradedBeside, *, num_processes: int | None) -> None:
        self._environment = environment
        self._pool = GraderPool(environment.grader, num_processes=num_processes)
        self._pool.start()

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`. Equal arguments are graded once."""
        asked = [self._environment.grading(item.reply, item.problem) for item in items]
        grades = await self._grade(list(dict.fromkeys(asked)), QUICK_S)
        slow = [each for each, grade in grades.items() if _is_late(grade)]
        grades |= await self._grade(slow[: max(LEAST_SLOW, len(asked) // ONE_SLOW_IN)], None)
        return [grades[each] for each in asked]

    async def _grade(
        self, asked: Sequence[tuple[str, ...]], cpu_s: float | None
    ) -> dict[tuple[str, ...], Grade]:
        calls = [GraderCall(arguments=each, cpu_s=cpu_s) for each in asked]
        return dict(zip(asked, await self._pool.grade(calls), strict=True))

    async def close(self) -> None:
        """See `Reward`."""
        await self._pool.close()


def _is_late(grade: Grade) -> bool:
    return isinstance(grade, Failed) and grade.kind == "timeout"


def task_reward(
    environment: Environment, *, num_processes: int | None = None, code: CodeOptions | None = None
) -> Reward:
    """A task's own reward. num_processes: that grade, where it has a grader; see `GraderPool`.
    code: how programs are run, where its replies are some."""
    if isinstance(environment, GradedByCode):
        options = code or CodeOptions()
        return code_reward(options, num_processes=num_processes, tested=environment.tested)
    if isinstance(environment, GradedBeside):
        return TaskGrader(environment, num_processes=num_processes)
    return TaskVerifier(environment)
