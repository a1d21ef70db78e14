"""Chat messages as clients send them, in the one form that chat templates are written for.

Clients send what their libraries dump: an assistant's turn of the OpenAI package has `content:
null` beside its `tool_calls`, `refusal`, `audio` and `function_call` null, and the arguments of a
call as JSON text; texts come as lists of parts; the system's turn may be a developer's. Templates
follow the documentation of transformers: content is text, arguments are an object, keys that say
nothing are not there. `ChatTemplate` calls this before every rendering, so that servers and
recipes write the same prompt for the same conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.requests.json_types import check_depth, decode_json
from rollout.text.template_traits import PLAIN, CallTraits, Traits

Message = Mapping[str, Any]

_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
"""Types of content parts, and where each has its text."""

_OWN_KEYS = frozenset(
    {"role", "content", "refusal", "annotations", "audio", "tool_calls", "function_call"}
)
_CALL_KEYS = frozenset({"type", "function", "name", "arguments"})
_NEEDS_CONTENT = frozenset({"system", "developer", "user"})
_NEVER_CALLS = _NEEDS_CONTENT | {"tool", "function"}


def normalised_messages(
    messages: Sequence[Message], traits: Traits = PLAIN
) -> list[dict[str, Any]]:
    """The conversation for a template of these traits. Keys that are not OpenAI's reach the
    template as they are, unless null.

    Raises InvalidRequest naming the message and key that cannot be read, UnsupportedOption for
    content that is no text (images, audio, files) and for calls that are no functions.
    """
    if not messages:
        raise InvalidRequest("messages is empty; send at least one", field="messages")
    names: dict[str, str] = {}
    return [
        _message(_checked(message, f"messages[{index}]"), f"messages[{index}]", traits, names)
        for index, message in enumerate(messages)
    ]


def normalised_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """Tools without the keys that are null, of the tool and of its function; None for no tools.

    Raises InvalidRequest naming the tool that is no object, UnsupportedOption for one that is no
    function.
    """
    if not tools:
        return None
    if not _is_list(tools):
        raise InvalidRequest("tools must be a list of objects", field="tools")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must be an object with a string 'role'", field=where)
    if message.get("audio"):
        raise UnsupportedOption(
            f"{where} has audio; this engine reads text alone", field=f"{where}.audio"
        )
    return message


def _message(message: Message, where: str, traits: Traits, names: dict[str, str]) -> dict[str, Any]:
    """One message. names: functions of the calls so far, by the ids of the calls."""
    content: Any = _content(message, where)
    sent = _sent_calls(message, where)
    if sent and message["role"] in _NEVER_CALLS:
        raise InvalidRequest(f"{sent[0][1]} is in a turn that is no assistant's", field=sent[0][1])
    calls = [_call(call, at, traits.calls) for call, at in sent]
    names.update((str(call["id"]), call["function"]["name"]) for call in calls if "id" in call)
    if content is None and not calls:
        content = _without_content(message, where)
    if calls and not content:
        content = _beside_calls(content, traits.calls)
    if content is not None and traits.content_parts:
        content = [{"type": "text", "text": content}] if content else []
    role = _role(message["role"], traits)
    kept = {"role": role, "content": content, **_said(message, _OWN_KEYS)}
    answered = names.get(str(kept.get("tool_call_id")))
    if role == "tool" and "name" not in kept and answered is not None:
        kept["name"] = answered
    return kept | {"tool_calls": calls} if calls else kept


def _said(found: Mapping[str, Any], own: frozenset[str]) -> dict[str, Any]:
    """What is not null, without the keys of `own`."""
    return {key: value for key, value in found.items() if value is not None and key not in own}


def _role(role: str, traits: Traits) -> str:
    if role == "developer" and not traits.developer:
        return "system"
    return "tool" if role == "function" else role


def _content(message: Message, where: str) -> str | None:
    """The text of a message; None if it has none."""
    content = message.get("content")
    if content is None:
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else None
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise InvalidRequest(
            f"{where}.content must be text or a list of text parts", field=f"{where}.content"
        )
    return "".join(_part(part, index, f"{where}.content") for index, part in enumerate(content))


def _part(part: Any, index: int, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidRequest(
            f"{where}[{index}] must be an object with a 'type', such as "
            '{"type": "text", "text": "..."}',
            field=where,
        )
    if kind not in _TEXT_PARTS:
        raise UnsupportedOption(
            f"{where}[{index}] is a part of type {kind[:100]!r}; this engine reads text alone",
            field=where,
        )
    text = part.get(_TEXT_PARTS[kind])
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"{where}[{index}].{_TEXT_PARTS[kind]} must be text", field=where)
    return text or ""


def _without_content(message: Message, where: str) -> str:
    """Content of a message that has neither that nor calls: an assistant, or a tool, may have
    said nothing."""
    if message["role"] in _NEEDS_CONTENT:
        raise InvalidRequest(f"{where} has no content; send text", field=f"{where}.content")
    return ""


def _beside_calls(content: str | None, traits: CallTraits) -> str | None:
    """Content of a turn that has calls and no text, as the template tells it apart."""
    if content is None:
        return None if traits.null_content else ""
    return None if traits.empty_is_null else content


def _sent_calls(message: Message, where: str) -> list[tuple[Any, str]]:
    """The calls of a message and where each stands; `function_call` is their older form."""
    calls = message.get("tool_calls")
    if calls is not None and not _is_list(calls):
        raise InvalidRequest(f"{where}.tool_calls must be a list", field=f"{where}.tool_calls")
    if calls:
        return [(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    older = message.get("function_call")
    return [] if older is None else [(older, f"{where}.function_call")]


def _call(call: Any, where: str, traits: CallTraits) -> dict[str, Any]:
    """One call. A bare function, without `type` and `function` around it, is taken for one."""
    if not isinstance(call, Mapping):
        raise InvalidRequest(f"{where} must be an object", field=where)
    if call.get("type") not in (None, "function"):
        raise UnsupportedOption(
            f"{where} is of type {str(call['type'])[:100]!r}; this engine reads calls of functions",
            field=f"{where}.type",
        )
    function, at = call.get("function"), f"{where}.function"
    if function is None:
        function, at = {key: call.get(key) for key in ("name", "arguments")}, where
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{at} must have a string 'name'", field=f"{at}.name")
    arguments = _arguments(function.get("arguments"), f"{at}.arguments", traits)
    return {
        **_said(call, _CALL_KEYS),
        "type": "function",
        "function": {**_said(function, frozenset({"arguments"})), "arguments": arguments},
    }


def _arguments(found: Any, where: str, traits: CallTraits) -> Any:
    """Arguments of a call, an object or the JSON text of one, as the template writes them."""
    if found is None or (isinstance(found, str) and found.strip() in ("", "null")):
        found = {}
    if traits.text_arguments:
        return found if isinstance(found, str) else _json_text(found, where)
    if isinstance(found, str):
        found = _read_arguments(found, where)
    if not isinstance(found, Mapping):
        raise InvalidRequest(f"{where} must be a JSON object, or the text of one", field=where)
    return found


def _read_arguments(text: str, where: str) -> Any:
    try:
        found = decode_json(text, Any, field=where, what=where)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{where} is no JSON text; the chat template of this model writes an object there: "
            f"{error.message}",
            field=where,
        ) from error
    check_depth([found], where)
    return found


def _json_text(found: Any, where: str) -> str:
    try:
        return json.dumps(found, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} cannot be written as JSON: {error}", field=where) from error


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} must be an object", field=where)
    if tool.get("type") not in (None, "function"):
        raise UnsupportedOption(
            f"{where} is of type {str(tool['type'])[:100]!r}; this engine takes functions",
            field=f"{where}.type",
        )
    kept = _said(tool, frozenset())
    if isinstance(kept.get("function"), Mapping):
        kept["function"] = _said(kept["function"], frozenset())
    return kept


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
