"""Text of others that a terminal may show: nothing in it moves the cursor, changes colours, turns
the direction of writing, or ends the encoding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and line feed, separators of lines, overrides of direction,
and halves of surrogate pairs."""
_SHORT: Mapping[str, str] = MappingProxyType({"\r": r"\r", "\x1b": r"\e"})


def safe(text: str) -> str:
    """The text with every unsafe character spelled out, such as `\\x07`."""
    return _UNSAFE.sub(_spelled, text)


def safe_line(text: str) -> str:
    """`safe`, on one line."""
    return safe(" ".join(text.split("\n")))


def _spelled(found: re.Match[str]) -> str:
    char = found.group()
    code = ord(char)
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
