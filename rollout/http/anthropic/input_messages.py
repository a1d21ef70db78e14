"""Messages of Anthropic's dialect as those of chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.http.chat.conversation import Conversation

Block = dict[str, Any]


def to_chat(system: str | list[Block] | None, messages: Sequence[dict[str, Any]]) -> Conversation:
    """The messages of chat: results of tools become messages of their own, in their place.

    Raises InvalidRequest naming the block that cannot be read, UnsupportedOption for one that is no
    text, thinking, call or result.
    """
    found = Conversation()
    if system is not None:
        found.add({"role": "system", "content": _text(system, "system")}, "system")
    if not messages:
        raise InvalidRequest("messages is empty; send at least one", field="messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role")
        if role == "assistant":
            _add_assistant(found, message, where)
        elif role == "user":
            _add_user(found, message, where)
        elif role == "system":
            text = _text(message.get("content"), f"{where}.content")
            found.add({"role": "system", "content": text}, where)
        else:
            raise InvalidRequest(
                f"{where}.role is 'user', 'assistant' or 'system'", field=f"{where}.role"
            )
    return found


def _add_assistant(found: Conversation, message: dict[str, Any], where: str) -> None:
    turn: dict[str, Any] = {"role": "assistant", "content": None}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, at in _blocks(message.get("content"), f"{where}.content"):
        kind = block.get("type")
        if kind == "text":
            texts.append(_string(block, "text", at))
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking", at))
        elif kind == "tool_use":
            path = f"messages[{len(found.messages)}].tool_calls[{len(calls)}]"
            found.places[path] = found.places[f"{path}.function"] = at
            found.places[f"{path}.function.arguments"] = f"{at}.input"
            calls.append(_call(block, at))
        elif kind != "redacted_thinking":
            raise _unserved(kind, at)
    turn["content"] = "".join(texts) if texts or not calls else None
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    found.add(turn, where)


def _add_user(found: Conversation, message: dict[str, Any], where: str) -> None:
    texts: list[str] = []
    blocks = _blocks(message.get("content"), f"{where}.content")

    def say() -> None:
        if texts:
            found.add({"role": "user", "content": "".join(texts)}, where)
            texts.clear()

    for block, at in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(_string(block, "text", at))
        elif kind == "tool_result":
            say()
            content = block.get("content")
            text = "" if content is None else _text(content, f"{at}.content")
            call_id = _string(block, "tool_use_id", at)
            found.add({"role": "tool", "tool_call_id": call_id, "content": text}, at)
        else:
            raise _unserved(kind, at)
    if not blocks:
        texts.append("")
    say()


def _blocks(content: Any, where: str) -> list[tuple[Block, str]]:
    """The blocks of a content, and where each stands; a text is one."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise InvalidRequest(f"{where} must be text or a list of blocks", field=where)
    return [(block, f"{where}[{index}]") for index, block in enumerate(content)]


def _text(content: Any, where: str) -> str:
    """The text of a content that holds nothing else."""
    texts = []
    for block, at in _blocks(content, where):
        if block.get("type") != "text":
            raise _unserved(block.get("type"), at)
        texts.append(_string(block, "text", at))
    return "".join(texts)


def _call(block: Block, where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where}.input must be an object", field=f"{where}.input")
    name, call_id = _string(block, "name", where), _string(block, "id", where)
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def _string(block: Block, name: str, where: str) -> str:
    found = block.get(name)
    if not isinstance(found, str):
        raise InvalidRequest(f"{where}.{name} must be text", field=f"{where}.{name}")
    return found


def _unserved(kind: object, where: str) -> UnsupportedOption:
    return UnsupportedOption(
        f"{where} is a block of type {str(kind)[:100]!r}; this engine reads text, thinking, "
        "tool_use and tool_result",
        field=where,
    )
