"""Python functions that a model may call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec

from engine.errors import InvalidRequest
from rollout.programs.errors import ToolFailed, ToolRefused


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function with what the model is told of it.

    parameters: the JSON Schema of its arguments, an object. arguments: the type that decodes and
    checks them. function: called with them by name; may be async.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    arguments: type[msgspec.Struct]
    function: Callable[..., Any]

    @property
    def told(self) -> dict[str, Any]:
        """As OpenAI's clients write it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}

    async def call(self, arguments: str) -> str:
        """The result as text: a text as it is, other values as JSON. What is wrong with the
        arguments, JSON text, is the result too, for the model to read. Raises ToolFailed if the
        function raises anything but ToolRefused."""
        try:
            given = msgspec.json.decode(arguments or "{}", type=self.arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return f"error: {error}"
        try:
            found = self.function(**msgspec.structs.asdict(given))
            if inspect.isawaitable(found):
                found = await found
            return found if isinstance(found, str) else json.dumps(msgspec.to_builtins(found))
        except ToolRefused as error:
            return f"error: {error}"
        except Exception as error:  # whatever a program's own function raises
            raise ToolFailed(
                f"{self.name}({arguments[:200]}) raised {type(error).__name__}: {error}",
                field=self.name,
            ) from error


def tool(function: Callable[..., Any]) -> Tool:
    """A tool of a function: its name, its docstring, and parameters of the types it declares, which
    are those that msgspec decodes. Raises InvalidRequest naming the parameter that has none."""
    name = getattr(function, "__name__", "tool")
    hints = get_type_hints(function)
    fields: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in hints or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
            parameter.POSITIONAL_ONLY,
        ):
            raise InvalidRequest(
                f"{name} takes {parameter}; give every parameter of a tool a name and a type",
                field=f"{name}.{parameter.name}",
            )
        kind = hints[parameter.name]
        default = () if parameter.default is parameter.empty else (parameter.default,)
        fields.append((parameter.name, kind, *default))
    arguments = msgspec.defstruct(name, fields, forbid_unknown_fields=True, kw_only=True)
    return Tool(
        name=name,
        description=inspect.getdoc(function) or "",
        parameters=_object_schema(arguments, name),
        arguments=arguments,
        function=function,
    )


def _object_schema(arguments: type[msgspec.Struct], name: str) -> dict[str, Any]:
    """The schema of a Struct, as an object that stands by itself. Raises InvalidRequest (`name`)
    for a parameter of a type without a schema."""
    try:
        _, parts = msgspec.json.schema_components([arguments])
    except TypeError as error:
        raise InvalidRequest(
            f"{name} takes a type without a schema: {error}", field=name
        ) from error
    own = parts.pop(arguments.__name__)
    own.pop("title", None)
    return {**own, **({"$defs": parts} if parts else {})}
