"""Conversations of other dialects as messages of chat, and errors with the names that they have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest

_FUNCTION = re.compile(r"^(tools\[\d+\])\.function\b")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages of chat. places: paths of messages and calls, each with that of the part of the
    dialect's body which it was made of."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, message: dict[str, Any], where: str) -> None:
        """One message, made of what stands at `where`."""
        self.places[f"messages[{len(self.messages)}]"] = where
        self.messages.append(message)


@contextmanager
def translating(names: Mapping[str, str], conversation: Conversation) -> Iterator[None]:
    """Errors of what is done within have their fields, and the mentions of these, renamed.

    names: paths of chat fields to those of the dialect, beside the places of the conversation; the
    longest path that fits decides.
    """
    try:
        yield
    except InvalidRequest as error:
        raise _translated(error, {**names, **conversation.places}) from error


def _translated(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    old = error.field
    new = _FUNCTION.sub(r"\1", _renamed(old, names))
    if not old or new == old:
        return error
    message = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", lambda _: new, error.message)
    return type(error)(message, field=new)


def _renamed(field: str, names: Mapping[str, str]) -> str:
    fitting = [old for old in names if field == old or field.startswith((f"{old}.", f"{old}["))]
    if not fitting:
        return field
    longest = max(fitting, key=len)
    return names[longest] + field[len(longest) :]
