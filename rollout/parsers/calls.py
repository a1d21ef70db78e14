"""The content of a reply and the calls in it, whichever way a family writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Protocol

from rollout.parsers.events import CallBegin, CallBroken, Event, EventList
from rollout.parsers.source import NotACall, Source, Steps


class CallSyntax(Protocol):
    """How one family writes calls."""

    @property
    def openings(self) -> tuple[str, ...]:
        """What calls begin with, wherever it stands."""
        ...

    @property
    def line_openings(self) -> tuple[str, ...]:
        """What calls begin with at the beginning of a line."""
        ...

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        """Take the calls behind `opening`, and what closes them. Raises NotACall at the first
        character that cannot be: what was ended until then are calls."""
        ...


class CallReader:
    """What a syntax reads from, and tells of the calls that it finds.

    A function that is not among `names` is called in content: it is read like any other, so that
    nothing inside its arguments counts, and its text is given back.
    """

    def __init__(
        self, events: EventList, names: Collection[str], new_id: Callable[[], str]
    ) -> None:
        self.source = Source()
        self.spaces: list[str] = []
        self.is_begun = False
        self.has_content = False
        self._events = events
        self._names = names
        self._new_id = new_id
        self._hidden = False
        self._index = 0

    def say(self, text: str) -> None:
        """A piece of content."""
        self.has_content = self.has_content or bool(text)
        self._events.content(text)

    def offers(self, name: str) -> bool:
        """Whether a function may be called."""
        return name in self._names

    def begin(self, name: str, call_id: str = "") -> None:
        """A call of `name`, with an id of the model's own if it wrote one. Once a call."""
        assert not self.is_begun
        self.is_begun = True
        self._hidden = not self.offers(name)
        if self._hidden:
            self.give_hidden()
        else:
            self._events.add(CallBegin(self._index, call_id or self._new_id(), name))

    def arguments(self, text: str) -> None:
        """A piece of the JSON text of the arguments."""
        if not self._hidden:
            self._events.arguments(self._index, text)

    def end(self) -> None:
        """The call is whole."""
        assert self.is_begun
        self.is_begun = False
        if self._hidden:
            self.give_hidden()
            return
        self._index += 1
        self.spaces.clear()
        self.source.taken()

    def closing(self, *words: str) -> Steps[None]:
        """Take `words`, which close a call, in order, each if it is there, and the space before
        them."""
        for word in words:
            spaces = yield from self.source.spaces()
            found = yield from self.source.word(word)
            if self._hidden:
                self.give_hidden()
            else:
                self.spaces = [] if found else [*self.spaces, spaces]
                self.source.taken()

    def separator(self, between: str, *closing: str) -> Steps[str]:
        """Take `between`, which stands between calls, or one of `closing`, which stand behind the
        last one, and the space before it; "" if none is there: what follows is content. What
        stands between belongs to the call that follows, if one does."""
        spaces = yield from self.source.spaces()
        found = yield from self.source.word(between, *closing)
        if self._hidden:
            self.give_hidden()
        elif not found:
            self.spaces.append(spaces)
        if found != between:
            self.source.taken()
        else:
            self._hidden = False
        return found

    def give_hidden(self) -> None:
        """Pass on the text of a call that is content."""
        if self._hidden:
            self.say("".join(self.spaces) + self.source.taken())
            self.spaces.clear()

    def give_back(self) -> bool:
        """Nothing that was taken since the last call is one; whether it ends with a line."""
        text = "".join(self.spaces) + self.source.taken()
        self.spaces.clear()
        if self.is_begun and not self._hidden:
            self._events.add(CallBroken(self._index, text))
            self._index += 1
            self.has_content = True
        else:
            self.say(text)
        self.is_begun = False
        return "\n" in text[len(text.rstrip()) :]

    def leave(self) -> None:
        """What follows is content until something opens calls."""
        self._hidden = False

    @property
    def found_any(self) -> bool:
        """Whether there was a call."""
        return self._index > 0


class CallParser:
    """A `ReplyParser` of content and calls.

    names: functions that may be called. new_id: makes the ids of calls. White space between a
    call and content is the family's where nothing but calls stands beyond it.
    """

    def __init__(
        self, syntax: CallSyntax, names: Collection[str], new_id: Callable[[], str]
    ) -> None:
        self._syntax = syntax
        self._events = EventList()
        self._call = CallReader(self._events, names, new_id)
        self._openings = (*syntax.openings, *syntax.line_openings)
        first = "".join(re.escape(char) for char in sorted({word[0] for word in self._openings}))
        # Words and the space between them, up to what may open a call.
        self._plain = re.compile(rf"(?:[^\s{first}]++|\s++(?=[^\s{first}]))++")
        self._at_line_start = True
        self._steps = self._run()

    def push(self, text: str) -> list[Event]:
        """As `ReplyParser.push`."""
        self._call.source.push(text)
        next(self._steps)
        self._call.give_hidden()
        return self._events.take()

    def close(self) -> list[Event]:
        """As `ReplyParser.close`."""
        self._call.source.closed = True
        for _ in self._steps:
            pass
        return self._events.take()

    def _run(self) -> Steps[None]:
        while opening := (yield from self._content()):
            self._at_line_start = True
            try:
                yield from self._syntax.read(self._call, opening)
            except NotACall:
                self._at_line_start = self._call.give_back()
            self._call.leave()

    def _content(self) -> Steps[str]:
        """Pass content on up to an opening, which is taken; "" at the end of the reply."""
        call, source = self._call, self._call.source
        while True:
            call.spaces.append((yield from source.spaces()))
            if not (yield from source.more()):
                break
            source.taken()
            opening = yield from source.word(*self._openings)
            if opening and self._opens(opening):
                return opening
            self._pass_on(opening or source.match(self._plain) or source.take(source.at + 1))
        if call.has_content or not call.found_any:
            call.say("".join(call.spaces))
        return ""

    def _opens(self, opening: str) -> bool:
        if opening in self._syntax.openings or self._at_line_start:
            return True
        return any("\n" in spaces for spaces in self._call.spaces)

    def _pass_on(self, text: str) -> None:
        call = self._call
        if call.has_content or not call.found_any:
            call.say("".join(call.spaces))
        call.spaces.clear()
        call.say(text)
        self._at_line_start = False
