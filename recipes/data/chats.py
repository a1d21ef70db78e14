"""Prompts of a data set as conversations, looked at before anything is loaded."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import InvalidRequest
from recipes.data.column_map import kind_of
from recipes.data.rows import Row, at
from recipes.types import Message
from rollout.offline import normalised_messages

ROLES = ("system", "developer", "user", "assistant", "tool")
ASKING = ("user", "tool")
"""Roles of a turn that a reply answers."""


def prompt_chat(value: Any, row: Row, *, field: str) -> tuple[Message, ...]:
    """The conversation of a prompt that is a text or a list of messages.

    Raises InvalidRequest naming `field` and the row for a prompt that is null, of another type or
    empty, and for a chat that does not end where a reply begins."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise at(
            row.place,
            f"the prompt must be text or a list of messages, not {kind_of(value)}",
            field=field,
        )
    chat = checked_chat(value, row, field=field)
    role = chat[-1]["role"]
    if role not in ASKING:
        raise at(
            row.place,
            f"the prompt ends with a turn of role {role!r}; it must end with the user's, which "
            "the model answers",
            field=field,
        )
    if not str(chat[-1]["content"]).strip():
        raise at(row.place, "the prompt is empty; write it, or leave the row out", field=field)
    return chat


def checked_chat(messages: list[Any], row: Row, *, field: str) -> tuple[Message, ...]:
    """Messages in the form that templates are written for. Raises InvalidRequest naming `field`
    and the row for what is no message, a role that no template knows, and a NUL."""
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise at(
                row.place,
                f"message {index} has the role {role!r}; there are {', '.join(ROLES)}",
                field=field,
            )
    try:
        chat = normalised_messages(messages)
    except InvalidRequest as error:
        raise at(row.place, error.message, field=field) from error
    if any("\0" in str(message["content"]) for message in chat):
        raise at(row.place, "the text has a NUL character; take it out", field=field)
    return tuple(chat)


def key_of(chat: tuple[Message, ...]) -> str:
    """The canonical form of the prompt of a chat, which is all before the assistant's last turn:
    the text of one user turn, else JSON; prompts of equal keys are one problem."""
    asked = chat[:-1] if chat[-1]["role"] == "assistant" else chat
    if len(asked) == 1 and asked[0]["role"] == "user":
        return str(asked[0]["content"])
    return json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str)
