"""The built-in tasks: right answers, worked examples never asked."""

from __future__ import annotations

import random
import re

import pytest

from recipes.environments.base import problem_at
from recipes.environments.named_tasks import BUILT_IN
from recipes.types import Problem


def drawn(task: str, num: int = 200) -> list[Problem]:
    environment, rng = BUILT_IN[task](), random.Random(0)
    return [environment.draw(rng) for _ in range(num)]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def test_largest() -> None:
    for problem in drawn("largest"):
        asked = numbers(problem.question)
        assert len(set(asked)) == 3 and min(asked) >= 1 and max(asked) <= 99
        assert problem.answer == str(max(asked))
        assert numbers(problem.key) == sorted(asked)


def test_sorting() -> None:
    for problem in drawn("sorting"):
        asked = numbers(problem.question)
        assert numbers(problem.answer) == sorted(asked) and len(set(asked)) == 3


def test_addition() -> None:
    for problem in drawn("addition"):
        a, b = numbers(problem.question)
        assert problem.answer == str(a + b) and min(a, b) >= 0 and max(a, b) <= 9


def test_letter_count() -> None:
    answers = set()
    for problem in drawn("letter_count"):
        letter, word = problem.key.split()
        assert problem.answer == str(sum(c == letter for c in word))
        answers.add(problem.answer)
    assert {"0", "1", "2"} <= answers


@pytest.mark.parametrize("task", sorted(BUILT_IN))
def test_prompts_share_their_examples_and_never_ask_them(task: str) -> None:
    environment = BUILT_IN[task]()
    first, second = (environment.messages(problem_at(environment, "train", 0, i)) for i in (0, 1))
    assert first[:-1] == second[:-1]
    assert first[-1]["role"] == "user"
    shown = {m["content"] for m in first[:-1] if m["role"] == "user"}
    assert len(shown) >= 2
    assert not shown & {p.question for p in drawn(task)}


@pytest.mark.parametrize("task", sorted(BUILT_IN))
def test_only_the_answer_is_right(task: str) -> None:
    environment = BUILT_IN[task]()
    problem = problem_at(environment, "train", 0, 0)
    assert environment.verify(f" {problem.answer}\n", problem) == 1.0
    assert environment.verify(f"The answer is {problem.answer}", problem) == 0.0
    assert environment.verify("", problem) == 0.0
