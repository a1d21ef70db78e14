"""`tools`, `tool_choice` and `parallel_tool_calls` of a chat body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.http.openai.bodies import ChatBody
from rollout.parsers.functions import offered_functions
from rollout.text.messages import normalised_tools

_WORDS = ("none", "auto", "required")


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """What a turn may do with the tools. name: of the function that has to be called, where the
    mode is "required" and one was named. parallel: more than one call may come."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the turn has to be a call."""
        return self.mode == "required"


def tool_choice(body: ChatBody) -> ToolChoice:
    """What a body says of its tools.

    Raises InvalidRequest (`tool_choice`) for a call that is forced without a tool, or of a function
    that is not among the tools, and naming the tool that has no name of its own; UnsupportedOption
    for a choice, or a tool, of another kind.
    """
    functions = offered_functions(normalised_tools(body.tools) or ())
    parallel, choice = body.parallel_tool_calls, body.tool_choice
    mode: Any = "auto" if choice is None else choice
    name = None
    if mode not in _WORDS:
        mode, name = "required", _named(mode)
    if mode == "required" and not functions:
        raise InvalidRequest(
            "tool_choice forces a call and there are no tools; send some", field="tool_choice"
        )
    if name is not None and name not in functions:
        raise InvalidRequest(
            f"tool_choice names the function {name[:200]!r}, which is not among the tools",
            field="tool_choice",
        )
    return ToolChoice(mode=mode if functions else "none", name=name, parallel=parallel)


def _named(choice: str | dict[str, Any]) -> str:
    """The function that a choice names: `{"type": "function", "function": {"name": NAME}}`."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(choice, dict) and choice.get("type") in (None, "function") and name:
        if isinstance(name, str):
            return name
        raise InvalidRequest("tool_choice.function.name must be text", field="tool_choice")
    raise UnsupportedOption(
        f"tool_choice is one of {', '.join(map(repr, _WORDS))}, or the name of a function as "
        '{"type": "function", "function": {"name": "..."}}',
        field="tool_choice",
    )
