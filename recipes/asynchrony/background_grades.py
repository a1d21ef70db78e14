"""Groups that are graded in threads, while the loop goes on."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from recipes.asynchrony.grade_queue import Score
from recipes.asynchrony.open_group import OpenGroup
from recipes.types import Group

WORKERS = 8
"""Groups that are graded at once beside the loop."""
WAIT_S = 0.1
"""Longest that the loop waits for a grade when it waits for nothing else."""


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
