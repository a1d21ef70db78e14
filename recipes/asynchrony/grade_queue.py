"""Groups whose replies are whole, on their way to being graded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from recipes.asynchrony.open_group import OpenGroup
from recipes.types import Group

WORKERS = 8
"""Groups that are graded at once beside the loop."""
WAIT_S = 0.1
"""Longest that the loop waits for a grade when it waits for nothing else."""

Score = Callable[[OpenGroup], Group]
"""Grades the replies of a group that is whole."""


class GradeQueue(Protocol):
    """Takes groups and gives them back graded."""

    def put(self, group: OpenGroup) -> None:
        """Take a group that is whole."""
        ...

    def collect(self, *, wait_for_one: bool) -> list[Group]:
        """Groups that are graded; raises what their grading raised. wait_for_one: there is nothing
        else to do than to wait a moment for the first."""
        ...

    @property
    def num_open(self) -> int:
        """Groups that were put and not collected."""
        ...

    def close(self) -> None:
        """Grade no more. Idempotent."""
        ...


class InlineGrades:
    """Grades a group as it comes, so that nothing depends on how long that takes."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._graded: list[Group] = []

    def put(self, group: OpenGroup) -> None:
        """See `GradeQueue`."""
        self._graded.append(self._score(group))

    def collect(self, *, wait_for_one: bool) -> list[Group]:
        """See `GradeQueue`."""
        graded, self._graded = self._graded, []
        return graded

    @property
    def num_open(self) -> int:
        """See `GradeQueue`."""
        return len(self._graded)

    def close(self) -> None:
        """See `GradeQueue`."""


class BackgroundGrades:
    """Grades beside the loop, in threads: a slow judge holds up its own groups alone."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="grade")
        self._pending: list[Future[Group]] = []

    def put(self, group: OpenGroup) -> None:
        """See `GradeQueue`."""
        self._pending.append(self._pool.submit(self._score, group))

    def collect(self, *, wait_for_one: bool) -> list[Group]:
        """See `GradeQueue`."""
        if wait_for_one and self._pending:
            wait(self._pending, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        return [future.result() for future in done]

    @property
    def num_open(self) -> int:
        """See `GradeQueue`."""
        return len(self._pending)

    def close(self) -> None:
        """See `GradeQueue`."""
        self._pool.shutdown(wait=False, cancel_futures=True)
