"""Graders beside a run: in order, within their time, and one bad reply costs no other."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.environments.base import problem_at
from recipes.environments.file_task import load_task
from recipes.environments.gym import load_gym
from recipes.rewards.grader_main import GraderLimits
from recipes.rewards.graders import GraderPool, GraderSpec
from recipes.rewards.grading import Grading

pytestmark = pytest.mark.slow

SPEC = GraderSpec(function="tests.helpers.odd_graders:grade", sample=("1",))
LIMITS = GraderLimits(limit_s=0.5, wall_s=3.0, memory_bytes=1 << 30)


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    made = GraderPool(SPEC, num_processes=2, limits=LIMITS)
    yield made
    made.close()


def test_grades_come_in_the_order_asked(pool: GraderPool) -> None:
    asked = [(str(number),) for number in [*range(40), 3, 3]]
    assert [grade.reward for grade in pool.grade(asked)] == [float(n) for (n,) in asked]
    assert not any(grade.failed for grade in pool.grade(asked))
    assert pool.grade([]) == []


@pytest.mark.parametrize(
    "reply,reason",
    [
        ("loop", "more than 0.5 s of processor time"),
        ("loop in C", "more than 0.5 s of processor time"),
        ("loop that catches all", "more than 0.5 s of processor time"),
        ("sleep", "more than 3 s"),
        ("raise", "raised KeyError: 'no'"),
        ("recurse", "raised RecursionError"),
        ("exit", "exit code 3"),
        ("crash", "died of SIGSEGV"),
        ("killed", "was killed"),
        ("memory", "more memory than it may"),
        ("nan", "gave nan"),
        ("text", "raised ValueError"),
    ],
)
def test_a_reply_that_cannot_be_graded(pool: GraderPool, reply: str, reason: str) -> None:
    grades = pool.grade([("5",), (reply,), ("6",), ("7",)])
    assert [grade.reward for grade in grades] == [5.0, 0.0, 6.0, 7.0]
    assert [bool(grade.failed) for grade in grades] == [False, True, False, False]
    assert reason in grades[1].failed
    assert [grade.reward for grade in pool.grade([("8",), ("9",)])] == [8.0, 9.0]


def test_what_a_grader_prints_is_not_an_answer(pool: GraderPool) -> None:
    assert [grade.reward for grade in pool.grade([("print",), ("4",)])] == [1.0, 4.0]


def test_a_process_that_is_killed_between_calls_is_replaced(pool: GraderPool) -> None:
    (grade,) = pool.grade([("leader",)])
    os.kill(int(grade.reward), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while pool._workers[0]._process.poll() is None and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert [grade.reward for grade in pool.grade([("1",), ("2",)])] == [1.0, 2.0]


def test_a_grader_that_cannot_be_loaded_is_named() -> None:
    for function in ("no_such_module:grade", "tests.helpers.odd_graders:none"):
        broken = GraderPool(GraderSpec(function=function, sample=()), num_processes=1)
        with pytest.raises(InvalidRequest, match=function):
            broken.grade([("1",)])
        broken.close()


@pytest.mark.slow
def test_mathematics_of_a_file_is_graded_beside_the_run(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "What is {i}/2?", "answer": {i / 2}}}' for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    task = load_task(tmp_path / "t.jsonl")
    problems = [line.problem for line in task.lines]
    grading = Grading(task)
    replies = [f"It is $\\frac{{{i}}}{{2}}$" for i in range(8)]
    assert grading(replies, problems) == [1.0] * 8
    hard = [f"It is ${'9' * i}^{{9^{{9^{{9^9}}}}}}!$" for i in range(1, 4)]
    assert grading(hard, problems[:3]) == [0.0] * 3
    for ungraded in grading.take_ungraded():
        assert ungraded.reply in hard and "What is" in str(ungraded)
    assert grading(replies, problems) == [1.0] * 8
    assert grading.take_ungraded() == []
    grading.close()


FAKE_GYM = """
class DataSet:
    def __getitem__(self, index):
        return {"question": f"q{index}", "answer": str(index)}

    def score_answer(self, answer, entry):
        while answer == "evaluate me":
            pass
        return 1.0 if answer == entry["answer"] else 0.01

def create_dataset(name, **config):
    return DataSet()
"""


def test_scorers_of_reasoning_gym_run_beside_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reasoning_gym.py").write_text(FAKE_GYM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    task = load_gym("chain_sum")
    problems = [problem_at(task, "train", 0, index) for index in range(3)]
    grading = Grading(task)
    replies = [f" {problems[0].answer} ", "evaluate me", "x"]
    assert grading(replies, problems) == [1.0, 0.0, 0.01]
    (ungraded,) = grading.take_ungraded()
    assert "processor time: reply 'evaluate me'" in str(ungraded)
    grading.close()
    sys.modules.pop("reasoning_gym", None)
