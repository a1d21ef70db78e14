"""A user's own function as a reward: what it may ask for, and what it may do to itself."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InvalidRequest
from recipes.rewards.base import Grade
from recipes.rewards.user_function import OFFERED, UserFunction, keywords
from recipes.types import Problem
from tests.helpers.reward_items import SUM, item, items, kinds

pytestmark = pytest.mark.slow


@contextmanager
def user_function(
    function: str, problems: Sequence[Problem] = (SUM,), timeout_s: float = 60.0
) -> Iterator[UserFunction]:
    reward = UserFunction(function, problems, timeout_s=timeout_s, num_processes=2)
    try:
        yield reward
    finally:
        asyncio.run(reward.close())


def grade(reward: UserFunction, *replies: str) -> list[Grade]:
    return asyncio.run(reward.grade(items(replies)))


def test_a_file_with_all_that_may_be_asked_for(tmp_path: Path) -> None:
    """It imports a file beside it, has a column of the data, defaults, and functions that wait."""
    (tmp_path / "beside.py").write_text("RIGHT = 1.0\n")
    path = tmp_path / "math.py"
    path.write_text(
        "import asyncio, dataclasses\nfrom math import floor\nfrom beside import RIGHT\n"
        "@dataclasses.dataclass\nclass Seen:\n    text: str\n"
        "def score(reply, answer, level, *, weight=1.0):\n"
        "    return weight * RIGHT if reply == answer else floor(level) / 10\n"
        "async def slowly(**given):\n"
        "    await asyncio.sleep(0.01)\n"
        "    assert given['messages'] == [{'role': 'user', 'content': given['prompt']}]\n"
        "    assert given['completion'] == given['reply'] == Seen(given['reply']).text\n"
        "    assert given['columns'] == {'level': given['level']}\n"
        "    return given['num_tokens']\n"
    )
    with user_function(f"{path}:score") as reward:
        assert grade(reward, "4", "5") == [1.0, 0.3]
    with user_function(f"{path}:slowly") as reward:
        assert grade(reward, "four", "4") == [4.0, 1.0]


def test_a_path_is_that_of_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def score(reply):\n    return reply == '4'\n")
    monkeypatch.chdir(tmp_path)
    with user_function("mine.py:score") as reward:
        assert grade(reward, "4", "5") == [1.0, 0.0]


def test_a_module_path_is_one_too() -> None:
    with user_function("tests.helpers.odd_graders:leading_digit") as reward:
        assert kinds(grade(reward, "4", "x", "+")) == [1.0, 0.0, "raised"]


def test_what_goes_wrong_with_one_reply_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(reply):\n    return {'1': 1.0, 'nan': float('nan')}[reply]\n")
    with user_function(f"{path}:score") as reward:
        assert kinds(grade(reward, "1", "nan", "2", "1")) == [1.0, "not_finite", "raised", 1.0]


def test_a_function_that_waits_too_long_is_late_by_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import asyncio\nasync def score(reply):\n"
        "    await asyncio.sleep(3600 if reply == 'hang' else 0)\n    return 1\n"
    )
    with user_function(f"{path}:score", timeout_s=3.0) as reward:
        hanging, *others = grade(reward, "hang", "1", "2")
        assert kinds([hanging]) == ["timeout"] and "more than 3 s" in str(hanging)
        assert others == [1.0, 1.0]


@pytest.mark.parametrize(
    "source,told",
    [
        ("def other(reply): return 1", "has no function score"),
        ("score = 1", "score of .* is int, not a function"),
        ("def score(reply:", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os; os._exit(1)", "its process died"),
        ("def score(reply, colour): return 1", "asks for colour, and a reply of this task has"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_function_that_cannot_work_is_told_before_anything_is_graded(
    tmp_path: Path, source: str | None, told: str
) -> None:
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with (
        pytest.raises(InvalidRequest, match=told) as caught,
        user_function(f"{path}:score"),
    ):
        pass
    assert caught.value.field == "reward"


def test_columns_of_any_type_arrive_and_hide_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def score(reply, day, scores, size):\n"
        "    return float((reply, day, scores, size) == ('r', '2026-11-27', [1, 2], 3))\n"
    )
    columns = {
        "day": datetime.date(2026, 11, 27),
        "scores": np.array([1, 2]),
        "size": np.int64(3),
        "reply": "hidden",
    }
    problem = Problem(question="q", answer="a", key="k", columns=columns)
    with user_function(f"{path}:score", [problem]) as reward:
        assert asyncio.run(reward.grade([item("r", problem)])) == [1.0]


def test_the_names_that_are_told_are_those_that_come() -> None:
    assert set(keywords(item("4"))) == {*OFFERED, "level"}
