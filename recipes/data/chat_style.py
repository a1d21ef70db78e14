"""What is around every prompt of a run: a system message, and variables for the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from recipes.data.data_options import DataOptions, SftDataOptions
from recipes.types import Message
from rollout.offline import check_variables


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatStyle:
    """system: text of the system message, or "". variables: for the chat template."""

    system: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)

    def led(self, messages: Sequence[Message]) -> list[Message]:
        """The chat with the system message before it. Raises InvalidRequest (`system_prompt`) for
        one that has its own."""
        if not self.system:
            return list(messages)
        if messages and messages[0]["role"] in ("system", "developer"):
            raise InvalidRequest(
                "it begins with a system message of its own; leave --system-prompt out",
                field="system_prompt",
            )
        return [{"role": "system", "content": self.system}, *messages]


def chat_style(options: DataOptions | SftDataOptions, template: str | None) -> ChatStyle:
    """The style that the options ask for. template: the model's chat template, if it has one.

    Raises InvalidRequest naming the option that cannot be read, or that the template does not."""
    return ChatStyle(
        system=_system(options.system_prompt),
        variables=_variables(options.chat_template_kwargs, template),
    )


def _system(given: str | None) -> str:
    if given is None or not given.startswith("@"):
        return given or ""
    path = Path(given[1:])
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"system_prompt: cannot read {path}: {error}; give a text, or @ and a file in UTF-8",
            field="system_prompt",
        ) from error


def _variables(given: str | None, template: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    field = "chat_template_kwargs"
    try:
        variables = msgspec.json.decode(given, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"{field}: {given!r} is no JSON object ({error}); write such as "
            "'{\"enable_thinking\": false}'",
            field=field,
        ) from error
    check_variables(variables)
    if template is None:
        raise InvalidRequest(f"{field}: this model has no chat template; leave it out", field=field)
    for name in variables:
        if name not in template:
            raise InvalidRequest(
                f"{field}: the chat template of this model does not read {name!r}; check the name",
                field=field,
            )
    return variables
