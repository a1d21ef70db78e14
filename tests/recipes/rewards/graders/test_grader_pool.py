"""Graders beside a run: in order, within their time, and one bad reply costs no other."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.environments.base import problem_at
from recipes.environments.file_task import load_task
from recipes.environments.gym import load_gym
from recipes.rewards.base import Failed, Grade
from recipes.rewards.graders.grader_main import GraderLimits
from recipes.rewards.graders.pool import GraderCall, GraderPool
from recipes.rewards.graders.worker import GraderSpec
from recipes.rewards.grading import Grading
from recipes.rewards.loop_thread import LoopThread
from recipes.rewards.task_reward import LEAST_SLOW, task_reward
from recipes.types import Problem
from tests.helpers.char_model import CharAddition
from tests.helpers.reward_items import items, kinds

pytestmark = pytest.mark.slow

SPEC = GraderSpec(function="tests.helpers.odd_graders:grade", sample=("1",))
# Of the processor for what loops, and of the clock for what waits: a busy machine may give a
# process next to nothing of the first in the second.
LIMITS = GraderLimits(cpu_s=0.3, wall_s=600.0, memory_bytes=1 << 30)
CLOCK = GraderLimits(cpu_s=None, wall_s=4.0, memory_bytes=1 << 30)


class Pool:
    """A `GraderPool` for a test that waits."""

    def __init__(self, spec: GraderSpec = SPEC, limits: GraderLimits = LIMITS) -> None:
        self.loop = LoopThread()
        self.pool = GraderPool(spec, num_processes=2, limits=limits)

    def grade(self, *replies: str) -> list[Grade]:
        calls = [GraderCall(arguments=(reply,)) for reply in replies]
        return self.loop.run(self.pool.grade(calls))

    def close(self) -> None:
        self.loop.run(self.pool.close())
        self.loop.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="module")
def waiting() -> Iterator[Pool]:
    made = Pool(limits=CLOCK)
    yield made
    made.close()


def test_grades_come_in_the_order_asked(pool: Pool) -> None:
    asked = [*range(40), 3, 3]
    assert pool.grade(*map(str, asked)) == [float(number) for number in asked]
    assert pool.grade() == []


@pytest.mark.parametrize(
    "reply,kind,reason",
    [
        ("loop", "timeout", "more than 0.3 s of processor time"),
        ("loop in C", "timeout", "more than 0.3 s of processor time"),
        ("loop that catches all", "timeout", "more than 0.3 s of processor time"),
        ("raise", "raised", "raised KeyError: 'no'"),
        ("raise what cannot be told", "raised", "raised Untold"),
        ("recurse", "raised", "raised RecursionError"),
        ("sys.exit", "raised", "raised SystemExit: 0"),
        ("interrupt", "raised", "raised KeyboardInterrupt"),
        ("exit", "died", "exit code 3"),
        ("exit well", "died", "exit code 0"),
        ("crash", "died", "died of SIGSEGV"),
        ("killed", "died", "was killed"),
        ("leaderless", "died", "the process that graded it died"),
        ("memory", "memory", "more memory than it may"),
        ("nan", "not_finite", "gave nan"),
        ("huge", "not_finite", "gave inf"),
        ("none", "not_a_number", "gave NoneType, not a number"),
        ("text", "not_a_number", "gave str, not a number"),
        ("list", "not_a_number", "gave list, not a number"),
    ],
)
def test_a_reply_that_cannot_be_graded(pool: Pool, reply: str, kind: str, reason: str) -> None:
    before, failed, *after = pool.grade("5", reply, "6", "7")
    assert isinstance(failed, Failed)
    assert failed.kind == kind and reason in failed.reason
    assert [before, *after] == [5.0, 6.0, 7.0]
    assert pool.grade("8", "9") == [8.0, 9.0]


@pytest.mark.parametrize("reply", ["sleep", "sleep with alarms off", "stop"])
def test_a_reply_that_waits_is_late_by_the_clock(waiting: Pool, reply: str) -> None:
    before, failed, *after = waiting.grade("5", reply, "6", "7")
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.reason) == ("timeout", "took more than 4 s")
    assert [before, *after] == [5.0, 6.0, 7.0]


@pytest.mark.parametrize("reply", ["print", "true", "float32", "forks and both return"])
def test_a_reply_that_is_graded_nevertheless(pool: Pool, reply: str) -> None:
    assert pool.grade("5", reply, "6", "7") == [5.0, 1.0, 6.0, 7.0]


@pytest.mark.parametrize("reply", ["child", "child of a session", "daemon", "hangs with a child"])
def test_what_a_reply_has_started_ends_with_it(tmp_path: Path, reply: str) -> None:
    pool = Pool(limits=CLOCK)
    place = tmp_path / "pid"
    _, grade, *_ = pool.grade("5", f"{reply} {place}", "6")
    assert kinds([grade]) == (["timeout"] if reply.startswith("hangs") else [1.0])
    wait_until_gone(int(place.read_text()))
    assert pool.grade("7", "8") == [7.0, 8.0]
    pool.close()


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    pool = Pool(limits=GraderLimits(cpu_s=None, wall_s=600.0, memory_bytes=1 << 30))
    place = tmp_path / "pid"
    calls = [GraderCall(arguments=(f"hangs with a child {place}",))]

    async def interrupted() -> None:
        import asyncio

        task = asyncio.create_task(pool.pool.grade(calls))
        while not (place.exists() and place.read_text()):
            await asyncio.sleep(0.01)
        task.cancel()

    pool.loop.run(interrupted())
    pool.close()
    wait_until_gone(int(place.read_text()))


def wait_until_gone(pid: int) -> None:
    """Neither running nor a zombie."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, Path(f"/proc/{pid}/stat").read_text()
        time.sleep(0.01)


def test_the_clock_starts_with_the_work() -> None:
    """64 replies on two processes wait longer than one may take."""
    pool = Pool(limits=CLOCK)
    assert pool.grade(*["0.2 s"] * 64) == [1.0] * 64
    pool.close()


def test_a_process_that_is_killed_between_calls_is_replaced(pool: Pool) -> None:
    (leader,) = pool.grade("leader")
    assert isinstance(leader, float)
    os.kill(int(leader), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while pool.pool._workers[0]._process.poll() is None and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert pool.grade("1", "2") == [1.0, 2.0]


def test_a_grader_that_cannot_be_loaded_is_named() -> None:
    for function in ("no_such_module:grade", "tests.helpers.odd_graders:none"):
        broken = Pool(GraderSpec(function=function))
        with pytest.raises(InvalidRequest, match=function):
            broken.grade("1")
        broken.close()


def test_mathematics_of_a_file_is_graded_beside_the_run(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "What is {i}/2?", "answer": {i / 2}}}' for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    task = load_task(tmp_path / "t.jsonl")
    problems = [
        Problem(question=f"What is {i}/2?", answer=str(i / 2), key=str(i)) for i in range(8)
    ]
    grading = Grading(task_reward(task))
    replies = [f"It is $\\frac{{{i}}}{{2}}$" for i in range(8)]
    assert grading(items(replies, problems)) == [1.0] * 8
    hard = [f"It is ${'9' * i}^{{9^{{9^{{9^9}}}}}}!$" for i in range(1, 4)]
    assert kinds(grading(items(hard, problems[:3]))) == ["timeout"] * 3
    assert grading(items(replies, problems)) == [1.0] * 8
    grading.close()


class Busy(CharAddition):
    """A task whose grader takes its time for some replies."""

    grader = GraderSpec(function="tests.helpers.odd_graders:busy", sample=("1",))

    def grading(self, reply: str, problem: Problem) -> tuple[str, ...]:
        return (reply,)


def test_a_few_slow_replies_of_a_task_have_more_time_and_many_do_not() -> None:
    grading = Grading(task_reward(Busy(), num_processes=2))
    many = [f"busy {number}" for number in range(LEAST_SLOW + 2)]
    expected = [1.0, *[1.0] * LEAST_SLOW, "timeout", "timeout"]
    assert kinds(grading(items(["quick", *many]))) == expected
    assert kinds(grading(items(["busy"] * 9 + ["quick"]))) == [1.0] * 10
    grading.close()


def test_mathematics_is_graded_in_any_thread(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "2+2", "answer": 4}\n')
    grading = Grading(task_reward(load_task(tmp_path / "t.jsonl"), num_processes=1))
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.extend(grading(items(["4", "$5$"]))))
    thread.start()
    thread.join()
    assert grades == [1.0, 0.0]
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
    grading = Grading(task_reward(task))
    replies = [f" {problems[0].answer} ", "evaluate me", "x"]
    assert kinds(grading(items(replies, problems))) == [1.0, "timeout", 0.01]
    grading.close()
    sys.modules.pop("reasoning_gym", None)
