"""The grades of a run's replies: a reward in an event loop of its own, for a caller that waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from recipes.environments.base import Environment
from recipes.rewards.base import Grade, Item, Reward
from recipes.rewards.loop_thread import LoopThread
from recipes.rewards.task_reward import task_reward

Grader = Callable[[Sequence[Item]], list[Grade]]
"""A grade for each reply, in order; `Grading` is one."""


class Grading:
    """A `Grader`. Any thread may call; `close` ends processes and connections of the reward.

    measures_accuracy: the mean of its grades is a share of right answers, and is called so.
    """

    def __init__(self, reward: Reward, *, measures_accuracy: bool = True) -> None:
        self.measures_accuracy = measures_accuracy
        self._reward = reward
        self._loop = LoopThread()

    def __call__(self, items: Sequence[Item]) -> list[Grade]:
        """One grade an item, in order. Raises a `SlipstreamError` for a reward that cannot work."""
        return self._loop.run(self._reward.grade(items))

    def close(self) -> None:
        """End what the reward has started. Idempotent."""
        if self._loop.is_open:
            self._loop.run(self._reward.close())
            self._loop.close()


@contextlib.contextmanager
def grading_of(environment: Environment) -> Iterator[Grading]:
    """The task's own grading, for a few replies outside a run."""
    grading = Grading(task_reward(environment))
    try:
        yield grading
    finally:
        grading.close()
