"""The text between a reply and the next one: end of the turn, new messages, generation prompt.

A conversation is continued by its own token ids, so only what comes behind the last sampled token
is rendered. A stand-in for the reply is rendered in its place, and what the template writes behind
it is the bridge: whatever the template does to old replies, it does to the stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from rollout.text.messages import Message

Render = Callable[[Sequence[Message], bool], str]
"""A conversation as text, with or without the prompt for a reply. Raises InvalidRequest for one
that does not fit the template."""

_STAND_IN = "Zq7Xk"


def bridge(render: Render, before: Sequence[Message], after: Sequence[Message]) -> str | None:
    """What comes between a reply and the next: from the last character of an assistant's turn to
    the end of the next generation prompt.

    before: messages that the reply answered, from which a system turn is taken; after: the new
    ones. None where the template does not tell: it refuses the stand-in, writes it twice or not at
    all.
    """
    mark = _mark([*before, *after])
    try:
        text = render([*_system(before), *_stand_in(mark), *after], True)
    except InvalidRequest:
        return None
    _, found, rest = text.partition(mark)
    return rest if found and mark not in rest else None


def behind_stop(rest: str, stop: str) -> str | None:
    """`rest` of a turn whose reply ended with the stop token `stop`, which begins it; None where
    the template ends turns otherwise."""
    return rest[len(stop) :] if rest.startswith(stop) else None


def _stand_in(mark: str) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]


def _system(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[:1] if messages and messages[0].get("role") in ("system", "developer") else []


def _mark(messages: Sequence[Message]) -> str:
    """A word that no message has."""
    mark, told = _STAND_IN, str(messages)
    while mark in told:
        mark += "q"
    return mark
