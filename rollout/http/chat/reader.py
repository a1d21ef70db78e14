"""What the text of one reply holds, content, reasoning and calls, as dialects are to show it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from rollout.parsers.events import (
    CallArguments,
    CallBegin,
    CallBroken,
    Content,
    Event,
    Reasoning,
    Reply,
    ReplyParser,
    collect,
)
from rollout.parsers.source import Markers


class ReplyReader:
    """Reads one reply, whole or as it grows.

    parser: None for a reply that is all content. parallel: off, calls after the first are passed
    over. hidden: special tokens that the parser needs and that are not to be shown.
    with_reasoning: off, reasoning is left out.
    """

    def __init__(
        self,
        parser: ReplyParser | None,
        *,
        parallel: bool = True,
        hidden: Collection[str] = (),
        with_reasoning: bool = True,
    ) -> None:
        self._parser = parser
        self._parallel = parallel
        self._with_reasoning = with_reasoning
        self._content = WithoutTexts(hidden)
        self._reasoning = WithoutTexts(hidden)
        self._events: list[Event] = []
        self._only: int | None = None
        """The call that is shown, where only one is."""

    @property
    def is_plain(self) -> bool:
        """Whether all of the reply is content."""
        return self._parser is None

    def read(self, text: str, *, last: bool) -> list[Event]:
        """What `text`, the next of the reply, adds; `last`: nothing follows."""
        if self._parser is None:
            found: list[Event] = [Content(text)] if text else []
        else:
            parsed = self._parser.push(text) if text else []
            if last:
                parsed = [*parsed, *self._parser.close()]
            found = list(self._shown(parsed, last=last))
        self._events += found
        return found

    def whole(self, text: str) -> list[Event]:
        """The events of a reply that is all there: a call that breaks off is content."""
        self._events = settled(self.read(text, last=True))
        return self._events

    def reply(self) -> Reply:
        """The reply, as far as it was read."""
        return collect(self._events)

    def _shown(self, events: Iterable[Event], *, last: bool) -> Iterator[Event]:
        for event in events:
            match event:
                case Content(text=text):
                    yield from self._rest_of_reasoning()
                    if shown := self._content.push(text):
                        yield Content(shown)
                case Reasoning(text=text):
                    if self._with_reasoning and (shown := self._reasoning.push(text)):
                        yield Reasoning(shown)
                case CallBegin() | CallArguments() | CallBroken():
                    if self._is_shown(event):
                        yield from self._rest()
                        yield event
        if last:
            yield from self._rest()

    def _is_shown(self, event: CallBegin | CallArguments | CallBroken) -> bool:
        if self._parallel:
            return True
        if self._only is None and isinstance(event, CallBegin):
            self._only = event.index
        if event.index != self._only:
            return False
        if isinstance(event, CallBroken):
            self._only = None
        return True

    def _rest(self) -> Iterator[Event]:
        yield from self._rest_of_reasoning()
        if text := self._content.close():
            yield Content(text)

    def _rest_of_reasoning(self) -> Iterator[Event]:
        if text := self._reasoning.close():
            yield Reasoning(text)


def settled(events: Iterable[Event]) -> list[Event]:
    """The events of a whole reply without calls that break off, whose text is content."""
    found = list(events)
    broken = {event.index for event in found if isinstance(event, CallBroken)}
    return [
        Content(event.text) if isinstance(event, CallBroken) else event
        for event in found
        if not (isinstance(event, CallBegin | CallArguments) and event.index in broken)
    ]


class WithoutTexts:
    """A text as it grows, without some that may lie across its pieces."""

    def __init__(self, texts: Collection[str]) -> None:
        self._markers = Markers(*texts)
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain of the text so far and was not returned before."""
        if not self._markers.words:
            return text
        text = self._markers.pattern.sub("", self._held + text)
        end = len(text) - self._markers.held(text, 0)
        self._held = text[end:]
        return text[:end]

    def close(self) -> str:
        """What is held back: nothing follows that could complete it."""
        held, self._held = self._held, ""
        return held
