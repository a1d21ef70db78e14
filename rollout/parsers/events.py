"""What the text of a reply says, in order: the events that a `ReplyParser` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thinking block."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call number `index` of the reply calls the function `name`; `id` is the call's own."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the arguments of call `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """Call `index`, whose beginning was given, cannot be read: `text` is all it was written as.

    A whole reply has no such call, and the text is content; a stream that has sent the beginning
    sends the text as content.
    """

    index: int
    text: str


Event = Content | Reasoning | CallBegin | CallArguments | CallBroken


class ReplyParser(Protocol):
    """Reads one reply. Where its text is cut does not matter: events of one kind that follow each
    other add up to the same texts."""

    def push(self, text: str) -> list[Event]:
        """What is certain when `text` has come."""
        ...

    def close(self) -> list[Event]:
        """What is left at the end of the reply; nothing is pushed after it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call. arguments: the JSON text of an object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply; texts are "" where there is none."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def collect(events: Iterable[Event]) -> Reply:
    """The reply that all events of a parser, those of `close` included, add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    begun: dict[int, ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case Content():
                content.append(event.text)
            case Reasoning():
                reasoning.append(event.text)
            case CallBegin():
                begun[event.index] = ToolCall(id=event.id, name=event.name, arguments="")
                arguments[event.index] = []
            case CallArguments():
                arguments[event.index].append(event.text)
            case CallBroken():
                del begun[event.index]
                content.append(event.text)
    calls = tuple(
        replace(call, arguments="".join(arguments[index])) for index, call in begun.items()
    )
    return Reply(content="".join(content), reasoning="".join(reasoning), calls=calls)


class EventList:
    """Events of one push. Pieces of one kind that follow each other become one event."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._make: Callable[[str], Event] | None = None
        self._kind = ("", 0)
        self._pieces: list[str] = []

    def content(self, text: str) -> None:
        """A piece of content; "" is none."""
        self._piece(("content", 0), Content, text)

    def reasoning(self, text: str) -> None:
        """A piece of reasoning; "" is none."""
        self._piece(("reasoning", 0), Reasoning, text)

    def arguments(self, index: int, text: str) -> None:
        """A piece of the arguments of call `index`; "" is none."""
        self._piece(("arguments", index), partial(CallArguments, index), text)

    def add(self, event: CallBegin | CallBroken) -> None:
        """An event that is whole."""
        self._finish()
        self._events.append(event)

    def take(self) -> list[Event]:
        """All that came since the last call."""
        self._finish()
        events, self._events = self._events, []
        return events

    def _piece(self, kind: tuple[str, int], make: Callable[[str], Event], text: str) -> None:
        if not text:
            return
        if kind != self._kind or self._make is None:
            self._finish()
            self._kind, self._make = kind, make
        self._pieces.append(text)

    def _finish(self) -> None:
        if self._make is not None:
            self._events.append(self._make("".join(self._pieces)))
            self._make = None
            self._pieces.clear()
