"""The content of a reply: blocks that grow by its events, and what a stream says of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from rollout.parsers.events import CallArguments, CallBegin, CallBroken, Content, Event, Reasoning

Frames = Iterator[dict[str, Any]]


class ContentBlocks:
    """Blocks in their order: what is thought, said and called. One grows at a time.

    blocks: those there are, each whole once another begins, or at the end.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._pieces: list[str] = []

    def take(self, events: Iterable[Event]) -> Frames:
        """The frames of some events."""
        block: dict[str, Any]
        for event in events:
            match event:
                case Content(text=text) | CallBroken(text=text):
                    yield from self._grow({"type": "text", "text": ""}, "text_delta", "text", text)
                case Reasoning(text=text):
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                    yield from self._grow(block, "thinking_delta", "thinking", text)
                case CallBegin(id=call_id, name=name):
                    block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                    yield from self._begin(block)
                case CallArguments(text=text):
                    self._pieces.append(text)
                    yield self._delta("input_json_delta", "partial_json", text)

    def end(self) -> Frames:
        """The frames that end the block that grows."""
        if not self._is_open:
            return
        self._is_open = False
        block, text = self.blocks[-1], "".join(self._pieces)
        self._pieces.clear()
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _grow(self, block: dict[str, Any], kind: str, key: str, text: str) -> Frames:
        if not self._is_open or self.blocks[-1]["type"] != block["type"]:
            yield from self._begin(block)
        self._pieces.append(text)
        yield self._delta(kind, key, text)

    def _begin(self, block: dict[str, Any]) -> Frames:
        yield from self.end()
        self.blocks.append(block)
        self._is_open = True
        index = len(self.blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _delta(self, kind: str, key: str, text: str) -> dict[str, Any]:
        index = len(self.blocks) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, key: text}}


def _input(text: str) -> dict[str, Any]:
    """The arguments of a call as an object. What a limit cut off is no JSON, and is given as its
    text under the key that Anthropic's documentation has for that."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}
