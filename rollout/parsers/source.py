"""Text that comes in pieces, read as if it were all there.

What reads is a generator that yields where it needs more text; `yield from` waits for it. Every
character is looked at a bounded number of times: what was taken is never searched again, and what
is held back is shorter than a marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]

_SPACES = re.compile(r"\s+")


class NotACall(Exception):
    """What began like a call is none. Never leaves a parser."""


class Markers:
    """Texts that are looked for; of two that begin alike the longer one is found."""

    def __init__(self, *words: str) -> None:
        self.words = tuple(sorted(words, key=len, reverse=True))
        self.pattern = re.compile("|".join(map(re.escape, self.words)) or "(?!)")
        self.longest = max(map(len, words), default=0)

    def held(self, text: str, at: int) -> int:
        """How many characters at the end of `text`, none before `at`, may begin a marker."""
        for length in range(min(self.longest - 1, len(text) - at), 0, -1):
            if any(word.startswith(text[-length:]) for word in self.words):
                return length
        return 0


class Source:
    """The text of one reply. `text[at:]` is what has come and is not taken."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.closed = False
        self._taken: list[str] = []

    def push(self, text: str) -> None:
        """More text, behind what is there."""
        self.text = self.text[self.at :] + text
        self.at = 0

    def taken(self) -> str:
        """All that was taken since this was last called."""
        text, self._taken = "".join(self._taken), []
        return text

    def take(self, end: int) -> str:
        """The text up to `end`, which is taken."""
        piece = self.text[self.at : end]
        self.at += len(piece)
        self._taken.append(piece)
        return piece

    def match(self, pattern: re.Pattern[str]) -> str:
        """What `pattern` matches of the text that is there, which is taken; "" if nothing."""
        found = pattern.match(self.text, self.at)
        return "" if found is None else self.take(found.end())

    def more(self) -> Steps[bool]:
        """Wait for a character; False at the end of the reply."""
        while self.at == len(self.text) and not self.closed:
            yield
        return self.at < len(self.text)

    def peek(self) -> Steps[str]:
        """The next character, which is not taken; "" at the end of the reply."""
        return self.text[self.at] if (yield from self.more()) else ""

    def at_least(self, count: int) -> Steps[str]:
        """The next `count` characters, not taken; fewer only at the end of the reply."""
        while len(self.text) - self.at < count and not self.closed:
            yield
        return self.text[self.at : self.at + count]

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Take all that `pattern`, a repeated class of characters, matches."""
        pieces = []
        while (yield from self.more()) and (piece := self.match(pattern)):
            pieces.append(piece)
        return "".join(pieces)

    def spaces(self) -> Steps[str]:
        """Take all white space."""
        return (yield from self.run(_SPACES))

    def word(self, *words: str) -> Steps[str]:
        """Take the longest of `words` that the text goes on with; "" if none."""
        longest = max(map(len, words))
        while True:
            rest = self.text[self.at : self.at + longest]
            found = max((word for word in words if rest.startswith(word)), key=len, default="")
            longer = (word for word in words if len(word) > len(rest) and word.startswith(rest))
            if self.closed or not any(longer):
                return self.take(self.at + len(found))
            yield

    def need(self, *words: str) -> Steps[str]:
        """`word`, behind white space. Raises NotACall if none is there."""
        yield from self.spaces()
        found = yield from self.word(*words)
        if not found:
            raise NotACall
        return found

    def until(self, markers: Markers, sink: Sink) -> Steps[str]:
        """Take the text up to one of `markers`, in pieces to `sink`, and the marker, which is
        returned; "" at the end of the reply."""
        while (yield from self.more()):
            found = markers.pattern.search(self.text, self.at)
            if found is not None:
                sink(self.take(found.start()))
                return self.take(found.end())
            held = 0 if self.closed else markers.held(self.text, self.at)
            sink(self.take(len(self.text) - held))
            if held:
                yield
        return ""
