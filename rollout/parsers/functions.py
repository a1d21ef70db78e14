"""The functions that a request offers, of the tools as clients send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from engine.errors import InvalidRequest

Schema = Mapping[str, Any]
Functions = Mapping[str, Schema]
"""By name, the JSON schema of the arguments, an object."""

NO_ARGUMENTS: Schema = MappingProxyType(
    {"type": "object", "properties": {}, "additionalProperties": False}
)
"""Of a function that names no parameters."""


def offered_functions(tools: Sequence[Any]) -> Functions:
    """The functions of `tools`, in order: OpenAI's objects `{"type": "function", "function": ...}`,
    or the functions themselves.

    Raises InvalidRequest naming the tool that is no object, that has no name or another one's, or
    whose parameters are no object.
    """
    found: dict[str, Schema] = {}
    for index, tool in enumerate(tools):
        function, where = tool, f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f"{where} must be an object", field=where)
        if isinstance(tool.get("function"), Mapping):
            function, where = tool["function"], f"{where}.function"
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"{where} must have a name", field=f"{where}.name")
        if name in found:
            raise InvalidRequest(
                f"two tools are named {name[:100]!r}; give each a name of its own",
                field=f"{where}.name",
            )
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InvalidRequest(
                f"{where}.parameters must be a JSON schema, an object", field=f"{where}.parameters"
            )
        found[name] = NO_ARGUMENTS if parameters is None else parameters
    return found
