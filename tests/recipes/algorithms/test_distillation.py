"""Advantages of a distillation in closed form, and the batch that they are in."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.algorithms.distillation import distillation_advantages, mean_gap
from recipes.algorithms.presets import AlgorithmOptions, preset, resolve
from recipes.collecting.batching import make_batch
from recipes.types import Group, Problem
from tests.helpers.trajectories import trajectory

TEACHER = (np.array([-0.5, -3.0], np.float32), np.array([-2.0], np.float32))
STUDENT = (np.array([-1.0, -0.2], np.float32), np.array([-1.0], np.float32))


def test_the_advantage_of_a_token_in_closed_form() -> None:
    first, second = distillation_advantages(TEACHER, STUDENT)
    assert first.tolist() == pytest.approx([0.5, -2.8])
    assert second.tolist() == pytest.approx([-1.0])
    assert mean_gap(TEACHER, STUDENT) == pytest.approx((-0.5 + 2.8 + 1.0) / 3)
    assert mean_gap((), ()) == 0.0


def test_a_batch_is_judged_by_the_teacher_and_not_by_rewards() -> None:
    prompt = np.array([1, 2], np.int32)
    replies = [trajectory(prompt, [3, 4], reward=1.0), trajectory(prompt, [5], reward=0.0)]
    group = Group(problem=Problem(question="", answer="", key=""), trajectories=tuple(replies))
    batch = make_batch([group], preset("opd", 8), 8, teacher=TEACHER)
    found = [array.tolist() for array in batch.advantages]
    assert found == [pytest.approx([0.5, -2.0]), pytest.approx([-1.0])]
    assert batch.learns.tolist() == [True, True]


def test_one_sample_a_problem_is_enough() -> None:
    algorithm = resolve(AlgorithmOptions(algorithm="opd"), 8)
    assert algorithm.distils and not algorithm.compares_problem and not algorithm.needs_old_logprobs
