"""Regular expressions of requests: the syntax of Rust's regex crate, matching the whole output."""

from __future__ import annotations

import json
import re

from llguidance import regex_to_lark

from rollout.masks.grammar.languages.bounds import MAX_DEPTH, refuse

_CLASS_BEGIN = re.compile(r"\[\^?\]?")
"""A `]` right behind the bracket is one of the class."""


def regex_terminal(source: str) -> str:
    """The expression as a terminal of the Lark dialect, `/.../`.

    A `^` at its beginning and a `$` at its end, which say what holds anyway, are left out. Raises
    InvalidRequest naming the position for what no mask can follow.
    """
    shape = _shape(source)
    begin, end = source.startswith("^"), shape.ends_in_dollar
    if (begin or end) and shape.top_level_bar >= 0:
        refuse(
            f"the regular expression has an anchor beside the '|' at position "
            f"{shape.top_level_bar}, and so of one alternative only; it matches the whole output "
            "anyway, so leave anchors out"
        )
    body = source[1 if begin else 0 : len(source) - 1 if end else len(source)]
    if not body:
        return '""'
    return f"/{regex_to_lark(body, '')}/"


def literal(text: str) -> str:
    """A text as a literal of the Lark dialect."""
    return json.dumps(text)


class _Shape:
    """What a scan of an expression found. top_level_bar: position of a `|` outside groups, or -1.
    ends_in_dollar: whether its last character is a `$` that is an anchor."""

    top_level_bar = -1
    ends_in_dollar = False


def _shape(source: str) -> _Shape:
    """Look at groups, classes and escapes, without recursion. Raises InvalidRequest for groups
    too deep or not closed."""
    found, opened, at, in_class = _Shape(), [], 0, 0
    while at < len(source):
        char = source[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class += {"[": 1, "]": -1}.get(char, 0)
        elif char == "[":
            begin = _CLASS_BEGIN.match(source, at)
            assert begin is not None
            in_class, at = 1, begin.end() - 1
        elif char == "(":
            _check_group(source, at)
            opened.append(at)
            if len(opened) > MAX_DEPTH:
                refuse(
                    f"the regular expression has groups more than {MAX_DEPTH} deep at position {at}"
                )
        elif char == ")":
            if not opened:
                refuse(f"the regular expression closes no group at position {at}")
            opened.pop()
        elif char == "|" and not opened and found.top_level_bar < 0:
            found.top_level_bar = at
        elif char == "$" and at == len(source) - 1:
            found.ends_in_dollar = True
        at += 1
    if opened or in_class:
        where = f"a group at position {opened[-1]}" if opened else "a class"
        refuse(f"the regular expression does not close {where}")
    return found


def _check_group(source: str, at: int) -> None:
    for sign in ("(?=", "(?!", "(?<=", "(?<!"):
        if source.startswith(sign, at):
            refuse(
                f"the regular expression looks around at position {at} ({sign}...), which is not "
                "served; say what the text is instead of what is beside it"
            )
