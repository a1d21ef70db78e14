"""How much of a string, or of whitespace, tokens begin with.

Where so much of either is left that the same tokens fit, the same tokens may come.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SPACE = re.compile(rb"[ \t\n\r]*")
_LATER_BYTES = bytes(range(0x80, 0xC0))
"""Of characters of several bytes in UTF-8, those behind the first."""


@dataclass(frozen=True)
class TokenLengths:
    """chars, spaces: ascending, how many characters of a string and of whitespace tokens begin
    with; numbers that no token has may be among them."""

    chars: tuple[int, ...]
    spaces: tuple[int, ...]

    def fitting_chars(self, room: int) -> int:
        """How many of the lengths are at most `room`."""
        return bisect_right(self.chars, room)

    def fitting_spaces(self, room: int) -> int:
        """How many of the lengths are at most `room`."""
        return bisect_right(self.spaces, room)


def token_lengths(tokens: Sequence[bytes]) -> TokenLengths:
    """Of the tokens of a vocabulary; about 1 µs a token."""
    chars: set[int] = set()
    spaces: set[int] = set()
    for token in tokens:
        chars.update(_num_chars(token))
        found = _SPACE.match(token)
        spaces.add(found.end() if found else 0)
    return TokenLengths(tuple(sorted(chars)), tuple(sorted(spaces)))


def _num_chars(token: bytes) -> Iterable[int]:
    """How many characters it may be of, as part of a string."""
    if b"\\" in token:
        # Escapes are of several bytes.
        return range(len(token) + 2)
    begun = len(token.partition(b'"')[0].translate(None, _LATER_BYTES))
    # The last may not be whole.
    return (begun, begun + 1)
