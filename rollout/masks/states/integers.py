"""What may still come of a number, of which some characters have come.

Two beginnings that may be completed by the same characters are in the same state. States are
hashable, and None where nothing is said of a beginning.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

_FREE = "digits"
_DIGITS = frozenset(b"0123456789")

Bounds = tuple[tuple[int, int] | None, ...]
"""By how many digits are to come, from none on: the least and the largest number that they may be;
None where so many may not come."""


class Numbers(Protocol):
    """The numbers that a schema lets come."""

    def begin(self, char: int) -> Hashable | None:
        """The state behind the first character."""
        ...

    def after(self, state: Hashable, char: int) -> Hashable | None:
        """The state behind one character more."""
        ...


_ANY_NUMBER: dict[str, dict[str, str]] = {
    "-": {"0": "0", "d": _FREE},
    "0": {".": ".", "e": "e"},
    _FREE: {"0": _FREE, "d": _FREE, ".": ".", "e": "e"},
    ".": {"0": "fraction", "d": "fraction"},
    "fraction": {"0": "fraction", "d": "fraction", "e": "e"},
    "e": {"0": "exponent", "d": "exponent", "s": "sign"},
    "sign": {"0": "exponent", "d": "exponent"},
    "exponent": {"0": "exponent", "d": "exponent"},
}
"""JSON's numbers (RFC 8259, section 6): by state and kind of character, the next state."""


@dataclass(frozen=True)
class AnyNumber:
    """Any number that JSON has."""

    def begin(self, char: int) -> str | None:
        """`Numbers.begin`."""
        if char == ord("-"):
            return "-"
        return _ANY_NUMBER["-"].get(_kind(char))

    def after(self, state: Hashable, char: int) -> str | None:
        """`Numbers.after`."""
        return _ANY_NUMBER[str(state)].get(_kind(char))


@dataclass(frozen=True)
class Integers:
    """Whole numbers from `least` to `most`, both included; None where there is no bound."""

    least: int | None
    most: int | None

    def begin(self, char: int) -> Hashable | None:
        """`Numbers.begin`."""
        return "-" if char == ord("-") else self._first(char, negative=False)

    def after(self, state: Hashable, char: int) -> Hashable | None:
        """`Numbers.after`."""
        if state == "-":
            return self._first(char, negative=True)
        if char not in _DIGITS or state in ("0", "-0"):
            return None
        if isinstance(state, tuple):
            return _narrowed(state, char - ord("0"))
        return state

    def _first(self, char: int, *, negative: bool) -> Hashable | None:
        """Behind the first digit."""
        if char not in _DIGITS:
            return None
        digit = char - ord("0")
        if digit == 0:
            return "-0" if negative else "0"
        # What is bounded is the size of the number, whatever its sign.
        least, most = (self.most, self.least) if negative else (self.least, self.most)
        sign = -1 if negative else 1
        low = 0 if least is None else max(0, sign * least)
        if most is None:
            return _FREE if low <= 1 else None
        high = sign * most
        places = len(str(max(high, 0)))
        whole: Bounds = tuple(_within(low, high, 0, n) for n in range(places + 1))
        return _narrowed(whole, digit)


def _narrowed(bounds: Bounds, digit: int) -> Bounds:
    """Behind one digit more."""
    found = []
    for to_come, bound in enumerate(bounds[1:]):
        low, high = (1, 0) if bound is None else bound
        found.append(_within(low, high, digit * 10**to_come, to_come))
    return tuple(found)


def _within(low: int, high: int, before: int, to_come: int) -> tuple[int, int] | None:
    """Bounds of the number that `to_come` digits are, which is added to `before`."""
    least, most = max(0, low - before), min(10**to_come - 1, high - before)
    return (least, most) if least <= most else None


def _kind(char: int) -> str:
    if char == ord("0"):
        return "0"
    if char in _DIGITS:
        return "d"
    if char in b"eE":
        return "e"
    if char in b"+-":
        return "s"
    return chr(char)
