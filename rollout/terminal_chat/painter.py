"""Replies on the screen: streamed, with figures, and tokens coloured by their logprobs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TextIO

from rollout.terminal_chat.safe_text import safe, safe_line
from rollout.terminal_chat.talk import Piece

_COLOURS = ((-0.1, "green"), (-0.7, "bright_green"), (-2.3, "yellow"), (-4.6, "bright_red"))
"""Colours of logprobs above some: probabilities of about 0.9, 0.5, 0.1 and 0.01."""
_RAREST = "red"
_CODES: Mapping[str, int] = MappingProxyType(
    {"dim": 2, "red": 31, "green": 32, "yellow": 33, "bright_red": 91, "bright_green": 92}
)
"""Of ECMA-48's "select graphic rendition", as terminals have them."""


class Painter:
    """Writes replies to `out`, and what is about them to `notes`; where `out` is a terminal both go
    there. Without colours a token is followed by its logprob."""

    def __init__(self, out: TextIO, notes: TextIO) -> None:
        self.terminal = out.isatty()
        self._out = out
        self._notes = out if self.terminal else notes
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
        self._coloured = self.terminal and not plain
        self._begun_at = self._first_at = 0.0
        self._num_tokens = 0
        self._last = "\n"

    def begin(self) -> None:
        """A reply was asked for."""
        self._begun_at, self._first_at, self._num_tokens = time.monotonic(), 0.0, 0
        self._last = "\n"

    def piece(self, piece: Piece) -> None:
        """Show what came."""
        if not self._first_at and piece.num_tokens:
            self._first_at = time.monotonic()
        self._num_tokens = piece.num_tokens
        if "".join(text for text, _ in piece.tokens) == piece.text:
            for text, logprob in piece.tokens:
                self._token(text, logprob)
            if piece.tokens:
                return
        self._write(piece.text, "dim" if piece.kind == "thought" else "")

    def end(self, *, stopped: bool = False) -> None:
        """The reply is over: end its line, and say how fast it came."""
        self.end_line()
        seconds = time.monotonic() - (self._first_at or self._begun_at)
        rate = (self._num_tokens - 1) / seconds if self._num_tokens > 1 and seconds > 0 else 0.0
        waited = (self._first_at or time.monotonic()) - self._begun_at
        told = f"{self._num_tokens} tokens, {rate:.1f} tokens/s, first after {waited:.2f} s"
        self.note(f"[{'stopped, ' if stopped else ''}{told}]")

    def end_line(self) -> None:
        """Go to the beginning of a line."""
        if self._last != "\n":
            self._write("\n", "")

    def note(self, text: str) -> None:
        """A line about the chat, of texts that may be others'."""
        self._notes.write(f"{self._styled(safe_line(text), 'dim')}\n")
        self._notes.flush()

    def _token(self, text: str, logprob: float) -> None:
        if self._coloured:
            colours = (colour for least, colour in _COLOURS if logprob > least)
            self._write(text, next(colours, _RAREST))
        else:
            self._write(f"{text}({logprob:.2f})", "")

    def _write(self, text: str, style: str) -> None:
        if text:
            # Before: an interrupt may come at any call.
            self._last = text[-1]
            self._out.write(self._styled(safe(text), style))
            self._out.flush()

    def _styled(self, text: str, style: str) -> str:
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style and self._coloured else text
