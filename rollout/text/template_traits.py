"""What a chat template expects where templates differ, found by rendering a small conversation.

Templates agree on no form for a turn that only calls tools: some add its content to other text
and fail at None, some write the word None, some tell such turns apart by `content is none`; most
write arguments with `tojson` and want an object, some add them to other text and want JSON text.
Nothing in a template says which, so it is asked: the first form under which the call shows as it
should is the template's. llama.cpp's template engine, minja, finds capabilities in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]
"""Messages to text; None where the template refuses them."""

_USER, _NAME, _KEY, _ID = "probing text", "probed_function", "probed_key", "probe0000"
_OBJECT = {_KEY: "probed value"}
_TEXT = '{"probed_key": "probed value"}'
_WORDS = ("None", "null", "Undefined")


@dataclass(frozen=True, kw_only=True)
class CallTraits:
    """How turns with tool calls are written.

    null_content: content that is null is None, else "".
    empty_is_null: empty content has to be None too, else the calls would not show.
    text_arguments: arguments are JSON text, else an object.
    """

    null_content: bool = False
    empty_is_null: bool = False
    text_arguments: bool = False


class Traits(Protocol):
    """What `messages.normalised_messages` asks of a template."""

    @property
    def content_parts(self) -> bool:
        """Whether content is a list of parts, else text."""
        ...

    @property
    def developer(self) -> bool:
        """Whether there is a role developer, else its turns are the system's."""
        ...

    @property
    def calls(self) -> CallTraits:
        """How turns with tool calls are written."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedTraits:
    """Traits that are known."""

    content_parts: bool = False
    developer: bool = False
    calls: CallTraits = CallTraits()


PLAIN = FixedTraits()
"""Of the templates that transformers documents, and of conversations without a template."""


class TemplateTraits:
    """Traits of one template, each found when it is first asked for."""

    def __init__(self, source: str, render: Render) -> None:
        self._source = source
        self._render = render

    @cached_property
    def content_parts(self) -> bool:
        """Whether only content in parts shows."""
        if self._shows_user(_USER):
            return False
        return self._shows_user([{"type": "text", "text": _USER}])

    @cached_property
    def developer(self) -> bool:
        """Whether the template knows the role."""
        return "developer" in self._source

    @cached_property
    def calls(self) -> CallTraits:
        """The first form under which a call shows, else the first that writes no None."""
        found = None
        for arguments in (_OBJECT, _TEXT):
            empty, null = (self._call(content, arguments) for content in self._contents())
            null_is_clean = null is not None and not _adds_words(null, empty or "")
            clear = null_is_clean and _shows_call(null, arguments)
            if clear or _shows_call(empty, arguments):
                return CallTraits(
                    null_content=clear,
                    empty_is_null=clear and not _shows_call(empty, arguments),
                    text_arguments=arguments is _TEXT,
                )
            found = found or CallTraits(null_content=null_is_clean)
        return found or CallTraits()

    def _contents(self) -> tuple[Any, Any]:
        return ([] if self.content_parts else ""), None

    def _user(self) -> dict[str, Any]:
        parts = [{"type": "text", "text": _USER}]
        return {"role": "user", "content": parts if self.content_parts else _USER}

    def _shows_user(self, content: Any) -> bool:
        text = self._render([{"role": "user", "content": content}])
        return text is not None and _USER in text

    def _call(self, content: Any, arguments: Any) -> str | None:
        function = {"name": _NAME, "arguments": arguments}
        call = {"id": _ID, "type": "function", "function": function}
        turn = {"role": "assistant", "content": content, "tool_calls": [call]}
        return self._render([self._user(), turn])


def _adds_words(text: str, beside: str) -> bool:
    """Whether `text` has words for nothing that the same conversation with "" has not."""
    return any(text.count(word) > beside.count(word) for word in _WORDS)


def _shows_call(text: str | None, arguments: Any) -> bool:
    """Whether a call is there, its arguments neither as Python writes them nor encoded twice."""
    if text is None or _NAME not in text or _KEY not in text:
        return False
    return f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text
