"""Which family's form a chat template writes calls and thinking in, told by the marks in its text.

A template is a program, and the texts that it writes stand in it; so does what it tells the model
to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class _Marks:
    """A form, the expressions all of which its templates match, and those that none does."""

    name: str
    all_of: tuple[str, ...]
    none_of: tuple[str, ...] = ()


# The first that fits: forms that share marks with others stand before them.
_CALLS = (
    _Marks("deepseek-v3", ("<｜tool▁call▁begin｜>", "```json")),
    _Marks("deepseek-v3.1", ("<｜tool▁call▁begin｜>",)),
    _Marks("mistral-call-id", (r"\[TOOL_CALLS\]", r"\[CALL_ID\]")),
    _Marks("mistral-args", (r"\[TOOL_CALLS\]", r"\[ARGS\]")),
    _Marks("mistral", (r"\[TOOL_CALLS\]",)),
    _Marks("glm-4.7", ("</arg_key><arg_value>",), ("<tool_sep>",)),
    _Marks("glm", ("<arg_key>",), ("<tool_sep>",)),
    _Marks("qwen3-coder", ("<function=", "<parameter=")),
    _Marks("hermes", ("<tool_call>", "arguments"), ("<function=", "<arg_key>")),
    _Marks("pythonic", (r"func_name1?\(|\.name \+ ['\"]\(|<\|tool_call_start\|>",)),
    _Marks("llama3", (r"\{\\?\"name\\?\": ", r"\\?\"parameters\\?\": "), ("<function=",)),
)
_THINKING = (
    _Marks("mistral", (r"\[THINK\]",)),
    _Marks("glm", ("<arg_key>", "<think>", "</think>")),
    _Marks("qwen3", ("<think>", "</think>")),
    # Such a template takes the thinking out of turns, and knows no beginning of it.
    _Marks("deepseek-r1", ("</think>",)),
)


def told_tool_parser(template: str) -> str | None:
    """The form of the calls that a template writes; None if it writes none that is known."""
    return _first(_CALLS, template)


def told_reasoning_parser(template: str) -> str | None:
    """The form of the thinking that a template writes or takes out; None if it knows none."""
    return _first(_THINKING, template)


def _first(forms: tuple[_Marks, ...], template: str) -> str | None:
    text = _COMMENT.sub("", template)
    for form in forms:
        if all(re.search(mark, text) for mark in form.all_of) and not any(
            re.search(mark, text) for mark in form.none_of
        ):
            return form.name
    return None
