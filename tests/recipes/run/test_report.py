"""Figures of a step's rollouts."""

from __future__ import annotations

import dataclasses

from recipes.run.report import rollout_figures
from recipes.types import Group
from tests.helpers.trajectories import random_groups

SECONDS = {"generate": 1.0}


def with_failed(group: Group, num: int) -> Group:
    replies = [
        dataclasses.replace(t, failed="raised: x", reward=0.0, correct=0.0) if i < num else t
        for i, t in enumerate(group.trajectories)
    ]
    return dataclasses.replace(group, trajectories=tuple(replies))


def right(group: Group, reward: float) -> Group:
    replies = [dataclasses.replace(t, reward=reward, correct=reward) for t in group.trajectories]
    return dataclasses.replace(group, trajectories=tuple(replies))


def test_replies_without_a_grade_are_no_zeros() -> None:
    first, second = (right(group, 1.0) for group in random_groups(2, 3, vocab=5))
    figures = rollout_figures([with_failed(first, 2), with_failed(second, 3)], SECONDS)
    assert figures["reward"] == 1.0 and figures["frac_groups_all_wrong"] == 0.0


def test_a_step_without_a_grade_has_no_reward() -> None:
    groups = [with_failed(group, 3) for group in random_groups(2, 3, vocab=5)]
    greedy = dataclasses.replace(groups[0].trajectories[0])
    groups = [dataclasses.replace(group, greedy=greedy) for group in groups]
    figures = rollout_figures(groups, SECONDS)
    assert "reward" not in figures and "reward_greedy" not in figures
    assert "reward" not in rollout_figures(groups, SECONDS, compares_group=False)
