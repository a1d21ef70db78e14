"""Lines that other programs, and older runs, may have written: whatever `json.loads` reads.

Python's `json` writes NaN, Infinity and -Infinity, which JSON does not know, and lone halves of
surrogate pairs, which UTF-8 does not.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def read_object(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None for what is none. Texts hold no half of a surrogate pair."""
    try:
        value = json.loads(line)
        # Deep nesting that `json` reads may be too deep for what comes behind it.
        return _clean(value) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def read_as(line: bytes, kind: type[T]) -> T | None:
    """The line as a msgspec struct; None for one that is no such thing."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    value = read_object(line)
    try:
        return None if value is None else msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None


def number_of(value: object) -> float | None:
    """A number as a float; NaN for null, which a run writes for what is not finite. None for what
    is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole_text(text: str) -> str:
    """The text with a sign in place of every half of a surrogate pair, such as Python writes in
    names of files that are no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value
