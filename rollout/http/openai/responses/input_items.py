"""Items of a conversation as the messages of chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.http.chat.conversation import Conversation

Items = Sequence[dict[str, Any]]


def to_messages(instructions: str | None, before: Items, items: Items) -> Conversation:
    """The messages of items. What an assistant thought, said and called becomes one message.

    instructions: the system's first message. before: items that were kept, which come first.
    Raises InvalidRequest naming the item, UnsupportedOption for an item of a kind that is not
    served.
    """
    writer = _Writer()
    if instructions is not None:
        writer.add({"role": "system", "content": instructions}, "instructions")
    for item in before:
        writer.take(item, "previous_response_id")
    for index, item in enumerate(items):
        writer.take(item, f"input[{index}]")
    return writer.found


class _Writer:
    """Takes items in their order. found: what they are in chat, so far."""

    def __init__(self) -> None:
        self.found = Conversation()
        self._turn: dict[str, Any] | None = None
        """The assistant's message that goes on."""

    def add(self, message: dict[str, Any], where: str) -> None:
        """One message; it goes on where it is the assistant's."""
        self._turn = message if message["role"] == "assistant" else None
        self.found.add(message, where)

    def take(self, item: dict[str, Any], where: str) -> None:
        """One item."""
        kind = item.get("type", "message")
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            self._reasoning(item, where)
        elif kind == "function_call":
            self._call(item, where)
        elif kind == "function_call_output":
            self._output(item, where)
        else:
            raise UnsupportedOption(
                f"{where} is an item of type {str(kind)[:100]!r}; served are message, reasoning, "
                "function_call and function_call_output",
                field=f"{where}.type",
            )

    def _message(self, item: dict[str, Any], where: str) -> None:
        role, content = item.get("role"), item.get("content")
        if role != "assistant":
            self.add({"role": role, "content": content}, where)
            return
        turn = self._turn
        if turn is None or turn["content"] is not None or "tool_calls" in turn:
            turn = self._begin(where)
        turn["content"] = content

    def _reasoning(self, item: dict[str, Any], where: str) -> None:
        text = _reasoning_text(item, where)
        if not text:
            return
        turn = self._turn
        if turn is None or turn["content"] is not None or "tool_calls" in turn:
            turn = self._begin(where)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def _call(self, item: dict[str, Any], where: str) -> None:
        turn = self._begin(where) if self._turn is None else self._turn
        calls = turn.setdefault("tool_calls", [])
        at = f"messages[{len(self.found.messages) - 1}].tool_calls[{len(calls)}]"
        self.found.places[at] = self.found.places[f"{at}.function"] = where
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        calls.append(call)

    def _output(self, item: dict[str, Any], where: str) -> None:
        call_id, output = item.get("call_id"), item.get("output")
        if not isinstance(call_id, str):
            raise InvalidRequest(f"{where}.call_id must be text", field=f"{where}.call_id")
        if not isinstance(output, str | list):
            raise InvalidRequest(
                f"{where}.output must be text, or a list of text parts", field=f"{where}.output"
            )
        self.add({"role": "tool", "tool_call_id": call_id, "content": output}, where)

    def _begin(self, where: str) -> dict[str, Any]:
        """A turn of the assistant's that says nothing yet."""
        turn = {"role": "assistant", "content": None}
        self.add(turn, where)
        return turn


def _reasoning_text(item: dict[str, Any], where: str) -> str:
    """What was thought; where only a summary came, that."""
    for name in ("content", "summary"):
        parts = item.get(name)
        if parts is None:
            continue
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise InvalidRequest(f"{where}.{name} must be a list of parts", field=f"{where}.{name}")
        texts = [part.get("text") for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{where}.{name} has a part without text", field=f"{where}.{name}")
        if texts:
            return "".join(map(str, texts))
    return ""
