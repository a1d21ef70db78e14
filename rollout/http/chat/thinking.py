"""How much a model thinks before it answers, in the variables that chat templates read."""

from __future__ import annotations

from collections.abc import Collection
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


def thinking_variables(effort: str, known: Collection[str], *, field: str) -> dict[str, Any]:
    """The variables by which a template that reads those of `known` is told an effort: a level
    where it has them, else its switch.

    Raises UnsupportedOption (`field`) where it has neither.
    """
    if effort != OFF and _LEVEL in known:
        return {_LEVEL: effort}
    for name in _SWITCHES:
        if name in known:
            return {name: effort != OFF}
    raise UnsupportedOption(
        f"{field} is not served: the chat template of this model has no switch for thinking; "
        "leave it out",
        field=field,
    )
