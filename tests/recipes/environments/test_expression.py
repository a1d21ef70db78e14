"""The task whose replies are run: every expression that hits the target is right, and no other
text is run at all."""

from __future__ import annotations

import asyncio
import random

import pytest

from recipes.environments.base import heldout_problems, problem_at
from recipes.environments.expression import Expression
from recipes.rewards.base import Grade
from recipes.rewards.programs.code import CodeReward
from recipes.rewards.task_reward import task_reward
from recipes.types import Problem
from tests.helpers.reward_items import item
from tests.helpers.sandboxes import open_sandbox


def asked(target: int, larger: int, smaller: int) -> Problem:
    task, rng = Expression(), random.Random(0)
    key = f"{target} {larger} {smaller}"
    return next(p for p in iter(lambda: task.draw(rng), None) if p.key == key)


def test_problems() -> None:
    task = Expression()
    for index in range(100):
        problem = problem_at(task, "train", 0, index)
        assert eval(problem.answer) == problem.columns["target"]
        assert problem.question.split()[1::2][0] == str(problem.columns["target"])
    assert len(heldout_problems(task, 256)) > 32


@pytest.mark.parametrize(
    "reply", ["__import__('os')", "9 / 4", "x", "", "1" * 41, "９ * 4", "9\n*4"]
)
def test_other_text_is_not_run(reply: str) -> None:
    assert Expression().tested(reply, asked(36, 9, 4)).code == ""


@pytest.mark.slow
def test_replies_are_graded_by_running_them() -> None:
    open_sandbox().close()
    replies = {
        "10 * 4": 1.0,
        " 4*10\n": 1.0,
        "(10) * 4": 1.0,
        "40": 0.0,
        "10 + 4": 0.0,
        "10 * 2 * 2": 0.0,
        "10 * 4 * 1": 0.0,
        "10 *": 0.0,
        "10 ** 4": 0.0,
        "9 ** 9 ** 9 ** 9": 0.0,
        "The answer is 10 * 4": 0.0,
    }
    reward = task_reward(Expression())
    assert isinstance(reward, CodeReward)
    problem = asked(40, 10, 4)

    async def graded() -> list[Grade]:
        try:
            return await reward.grade([item(reply, problem) for reply in replies])
        finally:
            await reward.close()

    assert dict(zip(replies, asyncio.run(graded()), strict=True)) == replies
