"""Render a model's chat template, as Hugging Face tokenizers do.

The environment is the one templates are written for: a sandbox, trimmed blocks, loop
controls, `raise_exception`, `strftime_now`, and a `tojson` that leaves HTML characters
alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ContextTooLong, InvalidRequest
from rollout.text.messages import Message, normalised_messages, normalised_tools
from rollout.text.template_traits import TemplateTraits

OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What a template is given by name, beside the variables that a caller adds."""

_MAX_REASON = 500
_MAX_PROBE_CHARS = 1 << 20
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training masks; only its body
    is rendered here, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class ChatTemplate:
    """One compiled template, and its `source`. Raises InvalidRequest (`chat_template`) if it does
    not parse."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._environment = environment
        self._special_tokens = dict(special_tokens)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise InvalidRequest(
                f"the chat template does not parse: {error}", field="chat_template"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as one string. Messages and tools come as clients send them
        (`messages.normalised_messages`); `variables` reach the template as they are.

        Raises InvalidRequest naming `messages` if they are not what the template expects.
        """
        own = {"add_generation_prompt": add_generation_prompt, "tools": tools}
        return self.write(messages, {**variables, **own})

    def write(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        max_chars: int | None = None,
    ) -> str:
        """`render` with any names of variables, for callers who pass a client's on.

        max_chars: ends a template that writes more. Raises ContextTooLong (`messages`) then,
        else as `render`.
        """
        tools = normalised_tools(variables.get("tools"))
        found = normalised_messages(messages, self.traits)
        text = self._text(found, {**variables, "tools": tools}, max_chars)
        if max_chars is not None and len(text) > max_chars:
            raise ContextTooLong(
                f"the chat template writes more than {max_chars} characters, which no tokens of "
                "the context can hold; shorten the messages",
                field="messages",
            )
        return text

    @cached_property
    def variables(self) -> frozenset[str]:
        """What the template reads of what it is given: names that it does not set itself."""
        return frozenset(meta.find_undeclared_variables(self._environment.parse(self.source)))

    @cached_property
    def traits(self) -> TemplateTraits:
        """What this template expects of messages."""
        return TemplateTraits(self.source, self._probe)

    def _text(
        self, messages: Sequence[Message], variables: Mapping[str, Any], max_chars: int | None
    ) -> str:
        """What the template writes, up to the piece that passes `max_chars`."""
        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        names = {**self._special_tokens, **defaults, **variables, "messages": _plain(messages)}
        parts, size = [], 0
        try:
            for part in self._template.generate(names):
                parts.append(part)
                size += len(part)
                if max_chars is not None and size > max_chars:
                    break
            text = "".join(parts)
            text.encode()
        except Exception as error:  # the template is a program of somebody else's
            what = f"{type(error).__name__}: {error}"[:_MAX_REASON]
            raise InvalidRequest(
                f"messages do not fit the chat template: {what}", field="messages"
            ) from error
        return text

    def _probe(self, messages: Sequence[Message]) -> str | None:
        """What the template makes of messages; None if it refuses them."""
        try:
            return self._text(messages, {}, _MAX_PROBE_CHARS)
        except InvalidRequest:
            return None


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with their reasoning under each name that templates read, as transformers has
    them."""
    plain = []
    for message in messages:
        fields = dict(message)
        reasoning = next((fields[k] for k in _REASONING if fields.get(k) is not None), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        plain.append(fields)
    return plain


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse a client's variables that are named as arguments of the template's own. Raises
    InvalidRequest naming the variable below `chat_template_kwargs`."""
    for name in sorted(OWN_VARIABLES & variables.keys()):
        raise InvalidRequest(
            f"chat_template_kwargs has {name}, which is a field of its own; set that instead",
            field=f"chat_template_kwargs.{name}",
        )
