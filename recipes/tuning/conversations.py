"""Rows as conversations: a column of messages, or a prompt and a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes.data.chats import checked_chat, key_of, prompt_chat
from recipes.data.column_map import kind_of, lookup, usual_column
from recipes.data.data_options import SftDataOptions
from recipes.data.rows import Row, at
from recipes.environments.base import Environment
from recipes.types import Message, Problem

PROMPT_NAMES = ("messages", "prompt", "question", "problem", "instruction")
COMPLETION_NAMES = ("completion", "response", "output")
ANSWER_NAMES = ("answer", "solution")
"""Taken where no column has one of the other names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationLayout:
    """A `recipes.data.problem_table.Layout`. completion: None where `prompt` is the column of whole
    conversations."""

    prompt: str
    completion: str | None

    def problem(self, row: Row, *, field: str) -> Problem:
        """The conversation as a problem: its last turn is the answer, and in `chat` too unless it
        is one text after another. Raises InvalidRequest naming `field` and the row."""
        value = lookup(row, self.prompt, "prompt", field=field)
        if self.completion is None:
            chat = _whole(value, row, field)
        else:
            said = lookup(row, self.completion, "completion", field=field)
            chat = (*prompt_chat(value, row, field=field), _completion(said, row, field))
        answer, asked = chat[-1], chat[:-1]
        if asked[0]["role"] == "assistant":
            raise at(row.place, "begins with the assistant's turn; nothing asks it", field=field)
        if not answer.get("tool_calls") and not str(answer["content"]).strip():
            raise at(
                row.place, "the assistant's last turn is empty; leave the row out", field=field
            )
        is_text = (
            self.completion is not None and len(chat) == 2 and answer.keys() == asked[0].keys()
        )
        return Problem(
            question=str(asked[-1]["content"]),
            answer=str(answer["content"] or ""),
            key=key_of(chat),
            chat=() if is_text else chat,
        )


def find_conversations(options: SftDataOptions, row: Row, field: str) -> ConversationLayout:
    """The layout of a data set by its options and first row.

    Raises InvalidRequest, listing the columns there are, where an option names none of them, or
    is not given and not exactly one of the usual names is there."""
    prompt = options.prompt_column or usual_column(row, PROMPT_NAMES, "prompt", field=field)
    value = lookup(row, prompt, "prompt", field=field)
    completion = options.completion_column
    if completion is None and not _is_whole(value):
        is_named = any(name in row.columns for name in COMPLETION_NAMES)
        names = COMPLETION_NAMES if is_named else (*COMPLETION_NAMES, *ANSWER_NAMES)
        completion = usual_column(row, names, "completion", field=field)
    if completion is not None:
        lookup(row, completion, "completion", field=field)
    return ConversationLayout(prompt=prompt, completion=completion)


def conversation(environment: Environment, problem: Problem) -> list[Message]:
    """What is to be learnt of a problem: its chat with the assistant's last turn."""
    chat = environment.messages(problem)
    if chat[-1]["role"] == "assistant":
        return chat
    return [*chat, {"role": "assistant", "content": problem.answer}]


def _is_whole(value: Any) -> bool:
    last = value[-1] if isinstance(value, list) and value else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _whole(value: Any, row: Row, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        told = f"the conversation must be a list of messages, not {kind_of(value)}"
        raise at(row.place, told, field=field)
    chat = checked_chat(value, row, field=field)
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise at(
            row.place,
            f"the conversation ends with a turn of role {chat[-1]['role']!r}; it must end with the "
            "assistant's answer to another turn",
            field=field,
        )
    return chat


def _completion(said: Any, row: Row, field: str) -> Message:
    if isinstance(said, int | float) and not isinstance(said, bool):
        said = str(said)
    messages: Sequence[Any] = said if isinstance(said, list) else ()
    if isinstance(said, str):
        messages = [{"role": "assistant", "content": said}]
    if len(messages) != 1:
        told = f"the completion must be a text or one message, not {_what(said)}"
        raise at(row.place, told, field=field)
    message = checked_chat(list(messages), row, field=field)[0]
    if message["role"] != "assistant":
        told = f"the completion is a turn of role {message['role']!r}, not of the assistant"
        raise at(row.place, told, field=field)
    return message


def _what(said: Any) -> str:
    return f"{len(said)} of them" if isinstance(said, list) else kind_of(said)
