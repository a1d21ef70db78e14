"""The output of a response: items that grow by the events of a reply, and what a stream says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from rollout.parsers.events import CallArguments, CallBegin, CallBroken, Content, Event, Reasoning

Frames = Iterator[dict[str, Any]]
Status = Literal["completed", "incomplete"]
TextKind = Literal["message", "reasoning"]

_TEXT = {"message": "output_text", "reasoning": "reasoning_text"}
"""The type of the one part that an item with text has."""


class OutputItems:
    """Items in their order: what is thought, said and called. One grows at a time.

    items: those there are; the texts of the one that grows are put in when it ends. Frames have no
    `sequence_number` yet.
    """

    def __init__(self, draw_id: Callable[[], str]) -> None:
        self._draw_id = draw_id
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        self._pieces: list[str] = []
        self._entries: list[dict[str, Any]] = []

    def take(self, events: Iterable[Event], logprobs: Iterable[dict[str, Any]] = ()) -> Frames:
        """The frames of some events. logprobs: of the tokens that brought them, of a reply that is
        all text."""
        self._entries += logprobs
        for event in events:
            match event:
                case Content(text=text):
                    yield from self._text("message", text)
                case Reasoning(text=text):
                    yield from self._text("reasoning", text)
                case CallBegin(id=call_id, name=name):
                    yield from self._begin(self._call_item(call_id, name))
                case CallArguments(text=text):
                    self._pieces.append(text)
                    yield self._frame("function_call_arguments.delta", delta=text)
                case CallBroken(text=text):
                    yield from self._close("incomplete")
                    yield from self._text("message", text)

    def end(self, status: Status = "completed") -> Frames:
        """The frames that end the output. One that is empty is a message without text."""
        if not self.items:
            yield from self._open_text("message")
        yield from self._close(status)

    def _text(self, kind: TextKind, text: str) -> Frames:
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self._open_text(kind)
        self._pieces.append(text)
        more = {"logprobs": self._new_logprobs()} if kind == "message" else {}
        yield self._frame(f"{_TEXT[kind]}.delta", content_index=0, delta=text, **more)

    def _open_text(self, kind: TextKind) -> Frames:
        yield from self._begin(self._text_item(kind))
        part = _part(kind)
        self.items[-1]["content"].append(part)
        yield self._frame("content_part.added", content_index=0, part=_part(kind))

    def _begin(self, item: dict[str, Any]) -> Frames:
        yield from self._close("completed")
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items),
            "item": {**item, "content": []} if "content" in item else dict(item),
        }
        self.items.append(item)
        self._is_open = True

    def _close(self, status: Status) -> Frames:
        """The frames that end the item that grows."""
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._pieces)
        self._pieces.clear()
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._frame("function_call_arguments.done", name=item["name"], arguments=text)
        else:
            yield from self._end_text(item["content"][0], text)
        item["status"] = status
        index = len(self.items) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

    def _end_text(self, part: dict[str, Any], text: str) -> Frames:
        part["text"] = text
        more = {}
        if "logprobs" in part:
            self._new_logprobs()
            more = {"logprobs": part["logprobs"]}
        yield self._frame(f"{part['type']}.done", content_index=0, text=text, **more)
        yield self._frame("content_part.done", content_index=0, part=part)

    def _new_logprobs(self) -> list[dict[str, Any]]:
        """Those of tokens that came since the last text."""
        found, self._entries = self._entries, []
        self.items[-1]["content"][0]["logprobs"] += found
        return found

    def _frame(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        """A frame of the last item."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **place, **fields}

    def _text_item(self, kind: TextKind) -> dict[str, Any]:
        if kind == "reasoning":
            return {
                "id": self._new_id("rs"),
                "type": "reasoning",
                "status": "in_progress",
                "summary": [],
                "content": [],
            }
        return {
            "id": self._new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }

    def _call_item(self, call_id: str, name: str) -> dict[str, Any]:
        return {
            "id": self._new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": name,
            "arguments": "",
        }

    def _new_id(self, kind: str) -> str:
        return f"{kind}_{self._draw_id()}"


def _part(kind: TextKind) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _TEXT[kind], "text": ""}
    return part if kind == "reasoning" else {**part, "annotations": [], "logprobs": []}
