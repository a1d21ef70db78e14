"""Prompts as conversations: what is no conversation that a reply follows is named by its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.data.chats import checked_chat, key_of, prompt_chat
from recipes.data.rows import Place, Row

ROW = Row(place=Place(Path("t.parquet"), 7, "row"), columns={})
USER = {"role": "user", "content": "q"}


def test_texts_and_chats() -> None:
    assert prompt_chat("q", ROW, field="task") == (USER,)
    padded = {"role": "user", "content": "q", "name": None, "tool_calls": None}
    chat = [{"role": "system", "content": "s"}, padded]
    assert prompt_chat(chat, ROW, field="task") == (chat[0], USER)
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert prompt_chat(parts, ROW, field="task") == (USER,)


@pytest.mark.parametrize(
    "value,told",
    [
        (None, "not null"),
        (3, "not a number"),
        ({"role": "user"}, "not an object"),
        (" \n", "prompt is empty"),
        ([], "messages is empty"),
        ([{"role": "user", "content": ""}], "prompt is empty"),
        ([{"role": "human", "content": "q"}], "message 0 has the role 'human'; there are system"),
        (["q"], "message 0 has the role None"),
        ([USER, {"role": "assistant", "content": "a"}], "ends with a turn of role 'assistant'"),
        ([{"role": "system", "content": "s"}], "ends with a turn of role 'system'"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text alone"),
        ("a\0b", "NUL"),
    ],
)
def test_what_no_reply_follows(value: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=f"t.parquet row 7: .*{told}") as caught:
        prompt_chat(value, ROW, field="task")
    assert caught.value.field == "task"


def test_equal_prompts_have_equal_keys() -> None:
    system = {"role": "system", "content": "s"}
    assert key_of((USER,)) == "q"
    assert key_of((system, USER)) == key_of(
        tuple(dict(reversed(m.items())) for m in (system, USER))
    )
    assert key_of((system, USER)) != key_of((USER,))
    whole = [USER, {"role": "assistant", "content": "a"}]
    assert checked_chat(whole, ROW, field="task") == tuple(whole)
