"""How much a model thinks before it answers, in the variables that chat templates read."""

from __future__ import annotations

import re
from typing import Any

from engine.errors import UnsupportedOption

OFF = "none"
"""The effort that asks for no thinking."""

ON = "medium"
"""The effort of a request that asks for thinking and not for how much."""

_SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn thinking on and off: those of Qwen3 and GLM-4.5, and of DeepSeek-V3.1."""

_LEVEL = "reasoning_effort"
"""The variable of templates that know how much."""


def thinking_variables(effort: str, source: str, *, field: str) -> dict[str, Any]:
    """The variables by which the template `source` is told an effort: a level where it has them,
    else its switch.

    Raises UnsupportedOption (`field`) where it has neither.
    """
    if effort != OFF and _reads(source, _LEVEL):
        return {_LEVEL: effort}
    for name in _SWITCHES:
        if _reads(source, name):
            return {name: effort != OFF}
    raise UnsupportedOption(
        f"{field} is not served: the chat template of this model has no switch for thinking; "
        "leave it out",
        field=field,
    )


def _reads(source: str, name: str) -> bool:
    """Whether a template reads a variable of this name: not a key or an attribute, nor a word of
    its text."""
    return any(
        re.search(rf"(?<![\w.'\"-]){name}(?![\w'\"-])", block) is not None
        for block in re.findall(r"\{[%{](.*?)[%}]\}", source, re.DOTALL)
    )
