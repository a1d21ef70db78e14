"""From a reply to its program: the code in it, and the tests of its problem in every form."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.rewards.programs.tested import column_tests, extract_code
from recipes.types import Problem


def problem(**columns: Any) -> Problem:
    return Problem(question="Write f.", answer="", key="f", columns=columns)


@pytest.mark.parametrize(
    "reply,code",
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ("Use `x` and ```y```.", "Use `x` and ```y```."),
        ("```python\n", ""),
        ("", ""),
    ],
)
def test_the_code_of_a_reply(reply: str, code: str) -> None:
    assert extract_code(reply) == code


@pytest.mark.parametrize("opening", ["`" * 100_000, "```\n" * 30_000, "```a\n" + "b``" * 50_000])
def test_a_long_reply_takes_no_long_search(opening: str) -> None:
    assert len(extract_code(opening)) <= len(opening)


@pytest.mark.parametrize(
    "tests,asserts,pairs",
    [
        (["assert f(1)", "assert f(2)"], ("assert f(1)", "assert f(2)"), ()),
        ("assert f(1)\nassert f(2)", ("assert f(1)\nassert f(2)",), ()),
        ('["assert f(1)"]', ("assert f(1)",), ()),
        ([{"stdin": "1\n", "stdout": "2\n"}], (), (("1\n", "2\n"),)),
        ('[{"stdin": "1", "stdout": "2"}]', (), (("1", "2"),)),
        ({"inputs": ["1", "3"], "outputs": ["2", "4"]}, (), (("1", "2"), ("3", "4"))),
    ],
)
def test_the_tests_of_a_problem(tests: Any, asserts: Any, pairs: Any) -> None:
    found = column_tests("```\nf = abs\n```", problem(tests=tests))
    assert (found.code, found.asserts, found.pairs) == ("f = abs\n", asserts, pairs)


@pytest.mark.parametrize(
    "tests",
    [
        None,
        [],
        "",
        {},
        3,
        [1],
        [{"stdin": "1"}],
        [{"stdin": 1, "stdout": "2"}],
        ["assert f(1)", {"stdin": "1", "stdout": "2"}],
        {"inputs": ["1"], "outputs": []},
        {"inputs": "12", "outputs": "34"},
        {"inputs": [1], "outputs": [2]},
    ],
)
def test_a_problem_without_tests_is_refused_by_name(tests: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"'Write f\.' has no column tests") as caught:
        column_tests("", problem(tests=tests))
    assert caught.value.field == "reward"
    with pytest.raises(InvalidRequest, match="no column tests"):
        column_tests("", problem())
