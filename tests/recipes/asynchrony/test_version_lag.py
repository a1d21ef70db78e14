"""Figures of age, against counts by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.protocol import VersionSpan
from recipes.asynchrony.version_lag import lag_figures
from recipes.types import Group, Problem, Trajectory
from tests.helpers.trajectories import trajectory


def reply(*spans: tuple[int, int]) -> Trajectory:
    """A reply of (version, number of tokens)."""
    found, start = [], 0
    for version, num in spans:
        found.append(VersionSpan(version, start, start + num))
        start += num
    made = trajectory(np.arange(2, dtype=np.int32), list(range(start)))
    return dataclasses.replace(made, spans=tuple(found))


def group(*replies: Trajectory) -> Group:
    return Group(problem=Problem(question="?", answer="!", key="k"), trajectories=replies)


def test_shares_and_ages_by_hand() -> None:
    """Lags at version 7: 2 tokens of 3, 4 of 1, 4 of 0; replies are 3 and 1 and 0 old."""
    groups = [group(reply((4, 2), (6, 1), (7, 1)), reply((6, 3))), group(reply((7, 3)))]
    figures = lag_figures(groups, 7)
    assert figures == pytest.approx(
        {
            "async/staleness_mean": (2 * 3 + 4 * 1) / 10,
            "async/staleness_max": 3.0,
            "async/age_mean": 4 / 3,
            "async/age_max": 3.0,
            "async/versions_per_sample": 5 / 3,
            "async/lag_share/0": 0.4,
            "async/lag_share/1": 0.4,
            "async/lag_share/2": 0.0,
            "async/lag_share/3": 0.2,
        }
    )


def test_replies_that_nobody_learns_from_do_not_count() -> None:
    failed = dataclasses.replace(reply((0, 5)), failed="timeout: slow")
    assert lag_figures([group(failed, reply((7, 1)))], 7)["async/age_max"] == 0
    assert lag_figures([group(failed)], 7) == {}
    assert lag_figures([], 7) == {}
