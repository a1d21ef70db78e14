"""Figures of a step's rollouts."""

from __future__ import annotations

import dataclasses

from engine.protocol import SpecCounts
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


def test_drafts_are_reported_where_something_drafts() -> None:
    (group,) = random_groups(1, 3, vocab=5)
    assert not [name for name in rollout_figures([group], SECONDS) if "speculative" in name]
    counts = [SpecCounts(verifies=3, drafted=9, accepted=4), SpecCounts(), None]
    replies = [
        dataclasses.replace(t, spec=spec)
        for t, spec in zip(group.trajectories, counts, strict=True)
    ]
    figures = rollout_figures([dataclasses.replace(group, trajectories=tuple(replies))], SECONDS)
    assert figures["speculative/accept_length"] == 1 + 4 / 3
    assert figures["speculative/accept_rate"] == 4 / 9
    size = sum(len(t.response_ids) for t in replies)
    assert figures["speculative/drafted"] == 9 / size
    unused = [dataclasses.replace(t, spec=SpecCounts()) for t in replies]
    figures = rollout_figures([dataclasses.replace(group, trajectories=tuple(unused))], SECONDS)
    assert (figures["speculative/accept_length"], figures["speculative/accept_rate"]) == (1, 0)
