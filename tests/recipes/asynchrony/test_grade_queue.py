"""Grading in turn, and beside the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from engine.errors import GradingFailed
from recipes.asynchrony.background_grades import BackgroundGrades
from recipes.asynchrony.grade_queue import GradeQueue, InlineGrades
from recipes.asynchrony.open_group import OpenGroup
from recipes.types import Group, Problem

Score = Callable[[OpenGroup], Group]


def opened(position: int) -> OpenGroup:
    problem = Problem(question="?", answer="!", key="k")
    return OpenGroup(position=position, seed=0, index=0, problem=problem, requests=())


def graded(group: OpenGroup) -> Group:
    return Group(problem=group.problem, trajectories=(), position=group.position)


def collected(queue: GradeQueue) -> list[int]:
    found: list[int] = []
    while queue.num_open:
        found += [group.position for group in queue.collect(wait_for_one=True)]
    return found


@pytest.mark.parametrize("kind", [InlineGrades, BackgroundGrades])
def test_every_group_comes_back_graded_once(kind: Callable[[Score], GradeQueue]) -> None:
    queue = kind(graded)
    for position in range(20):
        queue.put(opened(position))
    assert sorted(collected(queue)) == list(range(20))
    assert queue.collect(wait_for_one=True) == []
    queue.close()


def test_a_slow_grader_holds_up_its_own_group_alone() -> None:
    may_end = threading.Event()

    def slow(group: OpenGroup) -> Group:
        assert group.position or may_end.wait(60)
        return graded(group)

    queue = BackgroundGrades(slow)
    for position in range(3):
        queue.put(opened(position))
    found: list[int] = []
    while len(found) < 2:
        found += [group.position for group in queue.collect(wait_for_one=True)]
    assert sorted(found) == [1, 2] and queue.num_open == 1
    may_end.set()
    assert collected(queue) == [0]
    queue.close()


def test_a_reward_that_cannot_work_ends_the_loop() -> None:
    def fails(group: OpenGroup) -> Group:
        raise GradingFailed("reward: no route", field="reward")

    queue = BackgroundGrades(fails)
    queue.put(opened(0))
    with pytest.raises(GradingFailed, match="no route"):
        collected(queue)
    queue.close()
