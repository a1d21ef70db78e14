"""Splits are disjoint by construction; streams are functions of seed and index."""

from __future__ import annotations

import random

import pytest

from recipes.environments.base import Environment, heldout_problems, problem_at, split_of
from recipes.environments.few_shot import FewShot
from recipes.environments.named_tasks import BUILT_IN
from recipes.types import Problem

TASKS = sorted(BUILT_IN)


@pytest.mark.parametrize("task", TASKS)
def test_training_never_meets_a_heldout_problem(task: str) -> None:
    environment = BUILT_IN[task]()
    heldout = {p.key for p in heldout_problems(environment, 256)}
    trained = {problem_at(environment, "train", seed, i).key for seed in (0, 1) for i in range(300)}
    assert heldout and trained
    assert not heldout & trained


@pytest.mark.parametrize("task", TASKS)
def test_streams_repeat_by_seed_and_index(task: str) -> None:
    def stream(seed: int) -> list[Problem]:
        return [problem_at(BUILT_IN[task](), "train", seed, i) for i in range(20)]

    assert stream(3) == stream(3)
    assert stream(3) != stream(4)


def test_heldout_problems_are_distinct_and_the_same_in_every_run() -> None:
    environment = BUILT_IN["largest"]()
    problems = heldout_problems(environment, 300)
    assert len({p.key for p in problems}) == 300
    assert problems[:256] == heldout_problems(environment, 256)


def test_a_small_task_gives_what_it_has() -> None:
    problems = heldout_problems(BUILT_IN["addition"](), 256)
    assert 5 <= len(problems) <= 30


def test_the_split_is_a_fixed_function_of_the_key() -> None:
    shares = [split_of(f"key {i}", 16) == "heldout" for i in range(4000)]
    assert 0.045 < sum(shares) / len(shares) < 0.08
    assert split_of("3 5 17", 16) == split_of("3 5 17", 16)


def test_a_task_with_an_empty_split_says_so() -> None:
    def only(rng: random.Random) -> Problem:
        return Problem(question="?", answer="!", key="one")

    wanted = "train" if split_of("one", 2) == "heldout" else "heldout"
    environment: Environment = FewShot(
        name="one",
        max_new_tokens=1,
        heldout_one_in=2,
        generate=only,
        examples=(),
        instruction="",
    )
    with pytest.raises(ValueError, match=r"no (train|heldout) problem"):
        problem_at(environment, wanted, 0, 0)  # type: ignore[arg-type]
