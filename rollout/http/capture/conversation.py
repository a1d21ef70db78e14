"""Conversations by what they say: keys of their beginnings, and of the whole with a reply."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.parsers.events import Reply
from rollout.text.messages import Message, normalised_messages, normalised_tools

_MOST_KEYS = 1024
_SAID = ("role", "content", "name", "tool_call_id", "tool_calls")
"""What tells messages apart; clients send the rest or leave it out as they like."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a prompt is written from. variables: of the template, `tools` among them. own_template:
    the model's template writes it, and not one that the request brings."""

    messages: Sequence[Message]
    variables: Mapping[str, Any]
    own_template: bool

    @property
    def num_chars(self) -> int:
        """About the characters of its messages."""
        return sum(len(str(message.get("content"))) for message in self.messages)

    def replies(self) -> list[int]:
        """Lengths of the beginnings that end with an assistant's turn and have a message behind
        them, shortest first; the last few of many."""
        ends = [i + 1 for i, m in enumerate(self.messages[:-1]) if m.get("role") == "assistant"]
        return ends[-_MOST_KEYS:]

    def keys(self) -> list[bytes]:
        """A key of every beginning of `replies`. Raises InvalidRequest for messages that cannot be
        read."""
        return self._keys(self.messages, self.replies())

    def key_with(self, reply: Reply) -> bytes:
        """The key of the whole, with a reply. Raises InvalidRequest for calls that cannot be sent
        back, such as one whose arguments are no JSON."""
        said = [*self.messages, _message(reply)]
        return self._keys(said, [len(said)])[0]

    def _keys(self, messages: Sequence[Message], ends: Sequence[int]) -> list[bytes]:
        if not ends:
            return []
        variables = {**self.variables, "tools": normalised_tools(self.variables.get("tools"))}
        hashed = hashlib.sha256(_bytes(variables))
        found, wanted = [], set(ends)
        for number, message in enumerate(normalised_messages(messages[: ends[-1]]), start=1):
            hashed.update(_bytes({name: message.get(name) or None for name in _SAID}))
            if number in wanted:
                found.append(hashed.digest())
        return found


def _message(reply: Reply) -> dict[str, Any]:
    """A reply as clients send it back."""
    calls = [
        {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in reply.calls
    ]
    return {"role": "assistant", "content": reply.content, "tool_calls": calls}


def _bytes(value: Any) -> bytes:
    """Equal for equal values. Integers of any size are in JSON texts."""
    return json.dumps(value, sort_keys=True).encode()
