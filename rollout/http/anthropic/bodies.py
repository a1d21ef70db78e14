"""The bodies of /v1/messages, and the chat body that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol.types import Float32, Int32, Message, Name, StopStrings
from rollout.http.chat.thinking import OFF, ON
from rollout.http.openai.bodies import ChatBody
from rollout.http.openai.fields import check_fields
from rollout.requests.json_types import check_depth, decode_json

T = TypeVar("T", bound="CountBody")


class ThinkingConfig(msgspec.Struct, forbid_unknown_fields=True):
    """type: whether to think. budget_tokens: how much; nothing ends it but `max_tokens`, which has
    to be above it. display: whether it is shown."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int32 | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """effort: how much to think. format: what the text has to be."""

    effort: Name | None = None
    format: dict[str, Any] | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens: what is part of the prompt."""

    model: Message = ""
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountBody, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Int32
    stop_sequences: StopStrings | None = None
    stream: bool = False
    temperature: Float32 = 1.0
    top_p: Float32 = 1.0
    top_k: Int32 = -1


NAMES = {
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "thinking",
    "stop": "stop_sequences",
}
"""Fields of chat by their names here."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def parse_messages(data: bytes, kind: type[T]) -> T:
    """The body. Raises InvalidRequest, and UnsupportedOption for what is not served, by name."""
    check_fields(decode_json(data or b"{}", dict[str, msgspec.Raw]), kind, "messages")
    body: T = decode_json(data or b"{}", kind, strict=False)
    for field in ("messages", "system", "tools", "tool_choice"):
        check_depth([getattr(body, field)], field)
    check_depth([body.output_config and body.output_config.format], "output_config.format")
    _check_budget(body)
    return body


def _check_budget(body: CountBody) -> None:
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is None or not isinstance(body, MessagesBody) or 0 < budget < body.max_tokens:
        return
    raise InvalidRequest(
        f"thinking.budget_tokens is {budget}; give 1 to max_tokens - 1, or leave it out",
        field="thinking.budget_tokens",
    )


def chat_body(body: CountBody, messages: list[dict[str, Any]]) -> ChatBody:
    """The chat body of a call, whose conversation is `messages`. Raises InvalidRequest, and
    UnsupportedOption for a tool that is not the caller's own."""
    choice = body.tool_choice or {}
    chat = ChatBody(
        model=body.model,
        messages=messages,
        tools=_chat_tools(body.tools),
        tool_choice=_chat_tool_choice(body.tool_choice),
        parallel_tool_calls=not choice.get("disable_parallel_tool_use"),
        response_format=_response_format(body.output_config),
        reasoning_effort=_effort(body),
        include_reasoning=body.thinking is None or body.thinking.display != "omitted",
    )
    if not isinstance(body, MessagesBody):
        return chat
    return msgspec.structs.replace(
        chat,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )


def _chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _chat_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise UnsupportedOption(
            f"{where} is of type {str(tool['type'])[:100]!r}, which only Anthropic runs; this "
            "engine takes tools with an input_schema",
            field=f"{where}.type",
        )
    function = {"name": tool.get("name"), "description": tool.get("description")}
    function["parameters"] = tool.get("input_schema")
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _chat_tool_choice(choice: Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in _CHOICES:
        raise InvalidRequest(
            "tool_choice.type is one of 'auto', 'any', 'tool' and 'none'", field="tool_choice.type"
        )
    return _CHOICES[str(kind)]


def _response_format(config: OutputConfig | None) -> dict[str, Any] | None:
    if config is None or config.format is None:
        return None
    if config.format.get("type") != "json_schema":
        raise UnsupportedOption(
            "output_config.format.type is 'json_schema' here", field="output_config.format.type"
        )
    if config.format.get("schema") is None:
        where = "output_config.format.schema"
        raise InvalidRequest(f"{where} is missing; give a JSON Schema", field=where)
    inner = {"name": "format", "schema": config.format["schema"]}
    return {"type": "json_schema", "json_schema": inner}


def _effort(body: CountBody) -> str | None:
    """How much to think, as chat says it; None for what the template does by itself."""
    if body.thinking is not None and body.thinking.type == "disabled":
        return OFF
    if body.output_config is not None and body.output_config.effort is not None:
        return body.output_config.effort
    return None if body.thinking is None else ON
