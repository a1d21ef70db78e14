"""Text of others that a terminal may show: nothing in it moves the cursor, changes colours, turns
the direction of writing, or ends the encoding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters but tab and line feed, separators of lines, marks of direction, what takes no
place, tags, and halves of surrogate pairs: those of `rollout/dashboard/static/text.js`, and halves.
Joiners stay: scripts and emoji need them."""
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
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
