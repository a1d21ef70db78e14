"""Replies without a grade: counted by kind, and too many of them end a run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.errors import GradingFailed
from recipes.rewards.failed_share import FailedShare, failed_figures, tell_failed
from recipes.types import Group, Problem
from tests.helpers.trajectories import trajectory

PROBLEM = Problem(question="What is 2+2?", answer="4", key="")


def group(*failed: str) -> Group:
    made = trajectory(np.zeros(1, np.int32), [1])
    return Group(
        problem=PROBLEM, trajectories=tuple(dataclasses.replace(made, failed=f) for f in failed)
    )


def test_failures_are_counted_by_kind() -> None:
    groups = [group("", "timeout: took: long"), group("raised: KeyError: 'no'", "timeout: x")]
    assert failed_figures(groups) == {
        "completions/num_ungraded": 3.0,
        "rewards/failed_share": 0.75,
        "rewards/failed/raised": 1.0,
        "rewards/failed/timeout": 2.0,
    }
    told = tell_failed(groups)
    assert told.startswith("3 replies not graded, and left out (2 timeout, 1 raised); ")
    assert "timeout: took: long: reply '' to 'What is 2+2?'" in told


def test_the_greedy_reply_counts_too() -> None:
    sampled = group("", "", "")
    greedy = dataclasses.replace(sampled.trajectories[0], failed="died: no")
    figures = failed_figures([dataclasses.replace(sampled, greedy=greedy)])
    assert figures["rewards/failed/died"] == 1.0 and figures["rewards/failed_share"] == 0.25


def test_a_step_without_failures_has_the_figures_too() -> None:
    assert failed_figures([group("", "")]) == {
        "completions/num_ungraded": 0.0,
        "rewards/failed_share": 0.0,
    }
    assert tell_failed([group("", "")]) == ""


def steps_until_the_end(share: FailedShare, *replies: tuple[str, ...]) -> int:
    """Steps, of the replies given in turn, that a run takes; 20 if it goes on."""
    for step in range(20):
        try:
            share.add([group(*replies[step % len(replies)])])
        except GradingFailed as error:
            assert error.field == "reward" and "http: refused" in str(error)
            return step + 1
    return 20


BAD, GOOD = "http: refused", ""


@pytest.mark.parametrize(
    "most,replies,expected",
    [
        (0.25, [(BAD, BAD)], 2),
        (0.25, [(BAD, GOOD)], 3),
        (0.25, [(BAD, GOOD, GOOD)], 4),
        (0.25, [(BAD, GOOD, GOOD, GOOD)], 20),
        (0.25, [(BAD, BAD), (GOOD,), (GOOD,), (GOOD,), (GOOD,)], 20),
        (0.0, [(GOOD, GOOD), (GOOD, BAD)], 2),
        (1.0, [(BAD, BAD)], 20),
    ],
)
def test_a_share_that_stays_ends_a_run_and_one_bad_step_does_not(
    most: float, replies: list[tuple[str, ...]], expected: int
) -> None:
    assert steps_until_the_end(FailedShare(most), *replies) == expected
