"""The thinking block at the beginning of a reply."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.parsers.events import Content, Event, EventList, ReplyParser
from rollout.parsers.source import Markers, Source, Steps


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How a family writes its thinking. always: replies begin within the block, whether or not
    the prompt opened it."""

    opening: str
    closing: str
    always: bool = False


class PlainParser:
    """A `ReplyParser` of a reply that is content."""

    def push(self, text: str) -> list[Event]:
        """As `ReplyParser.push`."""
        return [Content(text)] if text else []

    def close(self) -> list[Event]:
        """As `ReplyParser.close`."""
        return []


class ReasoningParser:
    """A `ReplyParser` that takes the thinking block off and gives the rest to `inner`.

    is_open: whether the reply begins within the block; else it has one if it begins with the
    opening marker. White space at the inner sides of the markers, and behind the block, is the
    family's. A block that is never closed is all reasoning.
    """

    def __init__(self, thinking: Thinking, inner: ReplyParser, *, is_open: bool) -> None:
        self._thinking = thinking
        self._inner = inner
        self._is_open = is_open
        self._source = Source()
        self._reasoning = EventList()
        self._rest: list[Event] = []
        self._held: list[str] = []
        self._steps = self._run()

    def push(self, text: str) -> list[Event]:
        """As `ReplyParser.push`."""
        self._source.push(text)
        next(self._steps)
        return self._take()

    def close(self) -> list[Event]:
        """As `ReplyParser.close`."""
        self._source.closed = True
        for _ in self._steps:
            pass
        return [*self._take(), *self._inner.close()]

    def _take(self) -> list[Event]:
        rest, self._rest = self._rest, []
        return [*self._reasoning.take(), *rest]

    def _run(self) -> Steps[None]:
        source = self._source
        spaces = yield from source.spaces()
        opened = yield from source.word(self._thinking.opening)
        if opened or self._is_open:
            yield from self._block()
        else:
            self._pass_on(spaces)
        while (yield from source.more()):
            self._pass_on(source.take(len(source.text)))
            source.taken()

    def _block(self) -> Steps[None]:
        source = self._source
        yield from source.spaces()
        closed = yield from source.until(Markers(self._thinking.closing), self._think)
        if closed:
            yield from source.spaces()
        else:
            self._reasoning.reasoning("".join(self._held))
        source.taken()

    def _think(self, text: str) -> None:
        """A piece of the block; white space waits for what follows it."""
        body = text.rstrip()
        if body:
            self._reasoning.reasoning("".join(self._held) + body)
            self._held.clear()
        self._held.append(text[len(body) :])
        self._source.taken()

    def _pass_on(self, text: str) -> None:
        if text:
            self._rest += self._inner.push(text)
