"""The body of POST /v1/responses, and the chat body that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import KvPolicy
from engine.protocol.types import (
    AllowedIds,
    ClientId,
    Float32,
    Int32,
    Int64,
    LogitBias,
    LogprobLaw,
    Message,
    Name,
    Penalty,
    Salt,
    StopString,
    StopStrings,
    TokenIds,
)
from rollout.http.openai.bodies import ChatBody
from rollout.http.openai.fields import check_fields
from rollout.requests.json_types import check_depth, decode_json

LOGPROBS = "message.output_text.logprobs"
# What is encrypted elsewhere is given in plain here, and may come back so.
_INCLUDES = (LOGPROBS, "reasoning.encrypted_content")


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    """format: what the text has to be; verbosity: only the usual one."""

    format: dict[str, Any] | None = None
    verbosity: Name | None = None


class ReasoningConfig(msgspec.Struct, forbid_unknown_fields=True):
    """effort: as in chat. summary: asks for one; all of the reasoning is given instead."""

    effort: Name | None = None
    summary: Name | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses; from `top_k` on, fields that are vLLM's and this engine's."""

    model: Message = ""
    input: str | list[dict[str, Any]] = msgspec.field(default_factory=list)
    instructions: str | None = None
    previous_response_id: ClientId | None = None
    store: bool = True
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Int32 | None = None
    temperature: Float32 = 1.0
    top_p: Float32 = 1.0
    top_logprobs: Int32 | None = None
    include: list[Name] | None = None
    stream: bool = False
    metadata: dict[str, str] | None = None
    top_k: Int32 = -1
    min_p: Float32 = 0.0
    repetition_penalty: Float32 = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Int64 | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    min_tokens: Int32 = 0
    return_token_ids: bool | None = None
    priority: Int64 = 0
    cache_salt: Salt | None = None
    request_id: ClientId | None = None
    allowed_token_ids: AllowedIds | None = None
    kv_policy: KvPolicy = "keep"
    logprob_law: LogprobLaw = "model"
    chat_template_kwargs: dict[str, Any] | None = None


_SAME = (frozenset(ResponsesBody.__struct_fields__) & frozenset(ChatBody.__struct_fields__)) - {
    "tools",
    "tool_choice",
    "top_logprobs",
}

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""Fields of chat by their names here."""


def parse_responses(data: bytes) -> ResponsesBody:
    """The body. Raises InvalidRequest, and UnsupportedOption for what is not served, by name."""
    check_fields(decode_json(data or b"{}", dict[str, msgspec.Raw]), ResponsesBody, "responses")
    body: ResponsesBody = decode_json(data or b"{}", ResponsesBody, strict=False)
    for field in ("input", "tools", "tool_choice", "chat_template_kwargs"):
        check_depth([getattr(body, field)], field)
    check_depth([body.text and body.text.format], "text.format")
    for name in body.include or ():
        if name not in _INCLUDES:
            raise UnsupportedOption(
                f"include has {name[:200]!r}; served are {', '.join(_INCLUDES)}", field="include"
            )
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise UnsupportedOption(
            "text.verbosity is not served; leave it out", field="text.verbosity"
        )
    if not body.input and body.previous_response_id is None:
        raise InvalidRequest("input is empty; send text, or items", field="input")
    return body


def chat_body(body: ResponsesBody, messages: list[dict[str, Any]]) -> ChatBody:
    """The chat body of a response, whose conversation is `messages`. Raises UnsupportedOption
    naming the tool that is no function."""
    logprobs = LOGPROBS in (body.include or ())
    return ChatBody(
        messages=messages,
        tools=_chat_tools(body.tools),
        tool_choice=_chat_tool_choice(body.tool_choice),
        max_tokens=body.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=(body.top_logprobs or 0) if logprobs else 0,
        response_format=_response_format(body.text),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        **{name: getattr(body, name) for name in _SAME},
    )


def input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    """The input as items; a text is the user's message."""
    if not isinstance(body.input, str):
        return body.input
    content = [{"type": "input_text", "text": body.input}]
    return [{"type": "message", "role": "user", "content": content}]


def _chat_tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Functions as chat has them. Raises UnsupportedOption for other tools."""
    if tools is None:
        return None
    found = []
    for index, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise UnsupportedOption(
                f"tools[{index}] is of type {str(tool.get('type'))[:100]!r}; this engine takes "
                "functions",
                field=f"tools[{index}].type",
            )
        function = {key: value for key, value in tool.items() if key != "type"}
        found.append({"type": "function", "function": function})
    return found


def _chat_tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """A choice as chat has it."""
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return choice
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if text.format.get("type") != "json_schema":
        return text.format
    if text.format.get("schema") is None:
        raise InvalidRequest(
            "text.format.schema is missing; give a JSON Schema", field="text.format.schema"
        )
    inner = {key: value for key, value in text.format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}
