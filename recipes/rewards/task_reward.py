"""The reward that a task brings along."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.environments.base import Environment, GradedBeside
from recipes.rewards.base import Grade, Item, Reward, as_grade
from recipes.rewards.graders import GraderCall, GraderPool


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
    """A `Reward`: the grader of a task that runs beside the run. Its processes start at once."""

    def __init__(self, environment: GradedBeside, *, num_processes: int | None) -> None:
        self._environment = environment
        self._pool = GraderPool(environment.grader, num_processes=num_processes)
        self._pool.start()

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`. Equal arguments are graded once."""
        asked = [self._environment.grading(item.reply, item.problem) for item in items]
        different = list(dict.fromkeys(asked))
        grades = await self._pool.grade([GraderCall(arguments=each) for each in different])
        known = dict(zip(different, grades, strict=True))
        return [known[each] for each in asked]

    async def close(self) -> None:
        """See `Reward`."""
        await self._pool.close()


def task_reward(environment: Environment, *, num_processes: int | None = None) -> Reward:
    """A task's own reward. num_processes: that grade, where it has a grader; see `GraderPool`."""
    if isinstance(environment, GradedBeside):
        return TaskGrader(environment, num_processes=num_processes)
    return TaskVerifier(environment)
