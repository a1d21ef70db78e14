"""Groups whose replies are whole, on their way to being graded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from recipes.asynchrony.open_group import OpenGroup
from recipes.types import Group

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
