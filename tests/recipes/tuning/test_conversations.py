"""Rows as conversations: messages, or a prompt and a completion."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.data.data_options import SftDataOptions
from recipes.data.rows import Place, Row
from recipes.environments.file_task import load_rows
from recipes.tuning.conversations import conversation, find_conversations
from recipes.types import Message
from tests.helpers.char_model import CharAddition

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def read(columns: dict[str, Any], **options: Any) -> Any:
    row = Row(place=Place(Path("t.jsonl"), 3, "line"), columns=columns)
    layout = find_conversations(SftDataOptions(**options), row, "task")
    return layout.problem(row, field="task")


@pytest.mark.parametrize(
    "columns,options,chat",
    [
        ({"messages": [SYSTEM, USER, SAID]}, {}, (SYSTEM, USER, SAID)),
        ({"messages": [USER, SAID, USER, SAID], "source": 1}, {}, (USER, SAID, USER, SAID)),
        ({"prompt": "q", "completion": "a"}, {}, ()),
        ({"prompt": [SYSTEM, USER], "completion": [SAID]}, {}, (SYSTEM, USER, SAID)),
        ({"instruction": "q", "output": "a", "input": ""}, {}, ()),
        ({"question": "q", "answer": 7, "response": "a"}, {}, ()),
        ({"question": "q", "answer": "a", "x": 7}, {}, ()),
        ({"question": "q", "x": "a", "response": 7}, {"completion_column": "x"}, ()),
        ({"x": {"y": [USER, SAID]}}, {"prompt_column": "x.y"}, (USER, SAID)),
    ],
)
def test_known_layouts(columns: dict[str, Any], options: Any, chat: tuple[Message, ...]) -> None:
    problem = read(columns, **options)
    assert (problem.question, problem.answer, problem.chat) == ("q", "a", chat)


@pytest.mark.parametrize(
    "columns,told",
    [
        ({"text": "q"}, "no column for the prompt: none of messages, prompt.*it has text"),
        ({"messages": [USER, SAID], "prompt": "q"}, "messages, prompt may each be the prompt"),
        ({"prompt": "q"}, "no column for the completion.*--completion-column"),
        ({"messages": [USER]}, "no column for the completion"),
        ({"prompt": "q", "completion": None}, "must be a text or one message, not null"),
        ({"prompt": "q", "completion": [SAID, SAID]}, "not 2 of them"),
        ({"prompt": "q", "completion": [USER]}, "role 'user', not of the assistant"),
        ({"prompt": "q", "completion": "\n"}, "last turn is empty"),
        ({"messages": [SAID, USER, SAID]}, "begins with the assistant's turn"),
        ({"messages": [SAID]}, "ends with a turn of role 'assistant'; .*to another turn"),
        ({"messages": [{"from": "human"}, SAID]}, "message 0 has the role None"),
    ],
)
def test_what_is_no_conversation_is_named(columns: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"t\.jsonl:3: .*{told}"):
        read(columns)


def test_later_rows_must_be_conversations_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    whole = (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    )

    def load() -> Any:
        return load_rows(
            path,
            lambda row, field: find_conversations(SftDataOptions(), row, field),
            train_split=None,
            heldout=None,
        )

    path.write_text(whole * 2)
    task = load()
    held = "heldout" if task.count("heldout") else "train"
    assert conversation(task, task.at(held, 0)) == [USER, SAID]
    for bad, told in (
        ('{"messages": [{"role": "user", "content": "q"}]}\n', "ends with a turn of role 'user'"),
        ('{"messages": "q"}\n', "must be a list of messages, not text"),
    ):
        path.write_text(whole + bad)
        with pytest.raises(InvalidRequest, match=rf"t\.jsonl:2: the conversation .*{told}"):
            load()


def test_the_answer_of_a_made_problem_is_what_is_learnt() -> None:
    task = CharAddition()
    problem = task.draw(random.Random(0))
    assert conversation(task, problem) == [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.answer},
    ]
