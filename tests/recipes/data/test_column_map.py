"""Columns of data sets people have: verl's, TRL's, GSM8K's and their like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.data.column_map import compiled, kind_of, lookup, map_columns
from recipes.data.data_options import DataOptions
from recipes.data.rows import Place, Row

PLACE = Place(Path("t.jsonl"), 3, "line")


def row(**columns: Any) -> Row:
    return Row(place=PLACE, columns=columns)


def answer(found: Row, *, needs_answer: bool = True, **options: Any) -> str:
    columns = map_columns(found, DataOptions(**options), needs_answer=needs_answer, field="task")
    return columns.answer_of(found, field="task")


@pytest.mark.parametrize(
    "columns,options,prompt,told",
    [
        ({"question": "q", "answer": "a #### 42"}, {}, "question", "a #### 42"),
        (
            {"question": "q", "answer": "a #### 41\n#### 42"},
            {"answer_pattern": "#### (.+)"},
            "question",
            "42",
        ),
        ({"prompt": "q", "solution": 4.5, "level": 3}, {}, "prompt", "4.5"),
        ({"messages": [], "ground_truth": 7}, {}, "messages", "7"),
        ({"prompt": "q", "answer": 10**400}, {}, "prompt", "1" + "0" * 400),
        (
            {
                "prompt": [],
                "question": "q",
                "reward_model": {"ground_truth": "42", "style": "rule"},
            },
            {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth"},
            "prompt",
            "42",
        ),
        (
            {"a.b": "q", "c": "x 1 y 2"},
            {"answer_pattern": r"\d", "prompt_column": "a.b"},
            "a.b",
            "",
        ),
    ],
)
def test_known_layouts(
    columns: dict[str, Any], options: dict[str, Any], prompt: str, told: str
) -> None:
    if "c" in columns:
        options, told = {**options, "answer_column": "c"}, "2"
    found = row(**columns)
    chosen = map_columns(found, DataOptions(**options), needs_answer=True, field="task")
    assert chosen.prompt == prompt
    assert chosen.answer_of(found, field="task") == told


def test_other_columns_are_handed_on() -> None:
    found = row(question="q", answer="4", level=3, reward_model={"style": "rule"})
    columns = map_columns(found, DataOptions(), needs_answer=True, field="task")
    assert columns.others(found) == {"level": 3, "reward_model": {"style": "rule"}}
    matched = DataOptions(answer_pattern=r"\d")
    columns = map_columns(found, matched, needs_answer=True, field="task")
    assert columns.others(found)["answer"] == "4", "the whole text is not the answer"


@pytest.mark.parametrize(
    "columns,options,told",
    [
        (
            {"text": "q", "answer": "a"},
            {},
            "no column for the prompt: none of prompt, .*text, answer",
        ),
        ({"prompt": "q", "question": "q", "answer": "a"}, {}, "prompt, question may each be"),
        ({"prompt": "q"}, {}, "no column for the answer.*--answer-column"),
        ({"prompt": "q", "answer": 1, "solution": 2}, {}, "answer, solution may each be"),
        (
            {"prompt": "q", "answer": 1},
            {"prompt_column": "x"},
            "no column 'x' .*it has prompt, answer",
        ),
        ({"prompt": "q", "r": {"style": 1}}, {"answer_column": "r.gt"}, "r is style;"),
        ({"prompt": "q", "r": "text"}, {"answer_column": "r.gt"}, "r is text;"),
        ({"prompt": "q", "answer": None}, {}, "text or a number, not null"),
        ({"prompt": "q", "answer": float("nan")}, {}, "not null"),
        ({"prompt": "q", "answer": float("inf")}, {}, "not an infinite one"),
        ({"prompt": "q", "answer": True}, {}, "not true or false"),
        ({"prompt": "q", "answer": ["1"]}, {}, "not a list"),
        ({"prompt": "q", "answer": {}}, {}, "not an object"),
        ({"prompt": "q", "answer": " "}, {}, "answer is empty"),
        ({"prompt": "q", "answer": "x"}, {"answer_pattern": "#### (.+)"}, "nothing that matches"),
    ],
)
def test_what_is_missing_is_named_with_what_there_is(
    columns: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        answer(row(**columns), **options)
    assert caught.value.field == "task"
    assert "t.jsonl:3: " in str(caught.value)


def test_a_reward_that_compares_with_nothing_needs_no_answer() -> None:
    assert answer(row(prompt="q"), needs_answer=False) == ""
    assert answer(row(prompt="q", answer=None), needs_answer=False) == ""
    found = row(prompt="q", answer=["1", "2"])
    columns = map_columns(found, DataOptions(), needs_answer=False, field="task")
    assert columns.answer_of(found, field="task") == ""
    assert columns.others(found) == {"answer": ["1", "2"]}
    assert answer(row(prompt="q", answer="x"), needs_answer=False, answer_pattern="y") == ""


def test_a_column_that_later_rows_lack() -> None:
    with pytest.raises(InvalidRequest, match=r"t\.jsonl:3: no column 'question' for the prompt"):
        lookup(row(answer="a"), "question", "prompt", field="task")


def test_a_broken_pattern() -> None:
    with pytest.raises(InvalidRequest, match="no regular expression") as caught:
        compiled("(")
    assert caught.value.field == "answer_pattern"
    assert kind_of(b"") == "bytes"
