"""The reward of programs: what is wrong in one is its own, and only the sandbox's failure is no
grade."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.environments.expression import Expression
from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.programs.code import CodeReward, code_reward
from recipes.rewards.programs.code_options import CodeOptions
from recipes.rewards.reward_options import RewardOptions
from recipes.sandbox.program import Limits
from recipes.sandbox.sandbox import Sandbox
from recipes.types import Problem
from tests.helpers.reward_items import item as reward_item
from tests.helpers.sandboxes import open_sandbox, pids

pytestmark = pytest.mark.slow

DOUBLE = ["assert f(1) == 2", "assert f(2) == 4", "assert f(3) == 6"]
SUMS = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "2 2\n", "stdout": "4\n"}]


def item(reply: str, tests: Any) -> Item:
    asked = Problem(question="Write f.", answer="", key="f", columns={"tests": tests})
    return reward_item(reply, asked)


def grades(reward: CodeReward, *items: Item) -> list[Grade]:
    return asyncio.run(reward.grade(items))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = open_sandbox(Limits(cpu_s=1, wall_s=60.0))
    yield made
    made.close()


@pytest.mark.parametrize(
    "reply,tests,whole,share",
    [
        ("def f(x): return 2 * x", DOUBLE, 1.0, 1.0),
        ("Sure!\n```python\nf = lambda x: x + x\n```", DOUBLE, 1.0, 1.0),
        ("def f(x): return 2", DOUBLE, 0.0, 1 / 3),
        ("no code at all", DOUBLE, 0.0, 0.0),
        ("f = 1 / 0", DOUBLE, 0.0, 0.0),
        ("import os; os._exit(0)", DOUBLE, 0.0, 0.0),
        ("while True: pass", DOUBLE, 0.0, 0.0),
        ("def f(x):\n    while x > 2: pass\n    return 2 * x", DOUBLE, 0.0, 2 / 3),
        ("a, b = map(int, input().split()); print(a + b)", SUMS, 1.0, 1.0),
        ("a, b = map(int, input().split()); print(a + b, '\\n')", SUMS, 1.0, 1.0),
        ("a, b = map(int, input().split()); print(a * b)", SUMS, 0.0, 0.5),
        ("print(3); raise SystemExit(1)", SUMS, 0.0, 0.0),
        ("print(3)", SUMS, 0.0, 0.5),
        ("input(); input()", SUMS, 0.0, 0.0),
        ("while True: pass", SUMS, 0.0, 0.0),
    ],
)
def test_grades(sandbox: Sandbox, reply: str, tests: Any, whole: float, share: float) -> None:
    asked = item(reply, tests)
    assert grades(CodeReward(sandbox), asked) == [whole]
    assert grades(CodeReward(sandbox, score="share"), asked) == [pytest.approx(share)]


def test_grades_come_in_order_and_equal_programs_run_once(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    real = Sandbox.submit

    def counted(self: Sandbox, program: Any) -> Any:
        runs.append(program)
        return real(self, program)

    monkeypatch.setattr(Sandbox, "submit", counted)
    items = [item(f"f = lambda x: x * {n}", DOUBLE) for n in (1, 2, 3, 2, 1, 2)]
    assert grades(CodeReward(sandbox), *items) == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert len(runs) == 3


def test_a_problem_without_tests_ends_the_run(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidRequest, match="no column tests"):
        grades(CodeReward(sandbox), item("f = 1", None))


def test_a_sandbox_that_is_lost_leaves_its_reply_without_a_grade() -> None:
    made = open_sandbox()
    reward = CodeReward(made)
    (pid,) = pids(made)

    async def killed() -> list[Grade]:
        slow = asyncio.create_task(reward.grade([item("import time; time.sleep(1000)", DOUBLE)]))
        while not Path(f"/proc/{pid}/task/{pid}/children").read_text():
            await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        return await slow

    (failed,) = asyncio.run(killed())
    assert isinstance(failed, Failed) and failed.kind == "died" and "sandbox" in failed.reason
    assert grades(reward, item("def f(x): return 2 * x", DOUBLE)) == [1.0]
    asyncio.run(reward.close())


def test_a_run_is_told_of_problems_without_tests_before_it_begins() -> None:
    open_sandbox().close()
    named = RewardOptions(reward=("code",))
    good, bad = item("", DOUBLE).problem, item("", None).problem
    with pytest.raises(InvalidRequest, match="no column tests"):
        open_grading(named, Expression(), [good, bad])
    grading = open_grading(named, Expression(), [good], code=CodeOptions(code_reward="share"))
    assert grading([item("def f(x): return 2", DOUBLE)]) == [1 / 3]
    grading.close()


def test_options_reach_the_sandbox() -> None:
    open_sandbox().close()
    options = CodeOptions(code_reward="share", code_seconds=1, code_memory_gb=0.25)
    reward = code_reward(options, num_processes=1)
    asked = [item("x = bytearray(300 << 20)\ndef f(x): return 2", DOUBLE)]
    assert grades(reward, *asked, item("def f(x): return 2", DOUBLE)) == [0.0, 1 / 3]
    asyncio.run(reward.close())
    more = code_reward(dataclasses.replace(options, code_memory_gb=0.5), num_processes=1)
    assert grades(more, *asked) == [1 / 3]
    asyncio.run(more.close())
