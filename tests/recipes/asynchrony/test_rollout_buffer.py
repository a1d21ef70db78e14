"""The oldest groups first, and none lost."""

from __future__ import annotations

import dataclasses

import pytest

from recipes.asynchrony.rollout_buffer import RolloutBuffer
from recipes.types import Group
from tests.helpers.trajectories import random_groups

GROUPS = random_groups(6, 2, vocab=9)


def at(position: int) -> Group:
    return dataclasses.replace(GROUPS[0], position=position)


def positions(groups: list[Group]) -> list[int]:
    return [group.position for group in groups]


def test_the_oldest_go_first_and_the_rest_stays() -> None:
    buffer = RolloutBuffer(map(at, (7, 2)))
    for position in (5, 9, 3):
        buffer.put(at(position))
    assert positions(buffer.pop_oldest(2)) == [2, 3]
    assert positions(buffer.groups()) == [5, 7, 9]
    buffer.put(at(4))
    assert positions(buffer.pop_oldest(9)) == [4, 5, 7, 9]
    assert buffer.count() == 0 and buffer.pop_oldest(1) == []


def test_none_goes_before_one_that_is_not_there_yet() -> None:
    buffer = RolloutBuffer(map(at, (1, 2, 4, 5)))
    assert buffer.count(3) == 2
    assert positions(buffer.pop_oldest(3, before=3)) == [1, 2]
    assert buffer.pop_oldest(3, before=3) == []
    assert buffer.count() == 2


def test_a_group_is_there_once() -> None:
    buffer = RolloutBuffer([at(1)])
    with pytest.raises(AssertionError, match="1"):
        buffer.put(at(1))
