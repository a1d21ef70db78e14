"""What each argument of a function may be, for families that write arguments one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.parsers.functions import Schema
from rollout.parsers.schema_kinds import kinds_of, resolved

_MAX_DEPTH = 32
_DEFINITIONS = ("$defs", "definitions")
_SERVED = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", *_DEFINITIONS),
        *("$schema", "$id", "$comment", "title", "description", "default", "examples"),
    }
)
_SAYS_NOTHING = frozenset({"title", "description", "default", "examples", "$comment"})


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a function: `forms` are the kinds of values that it may have."""

    key: str
    required: bool
    forms: tuple[Fixed | Open, ...]


@dataclass(frozen=True)
class Fixed:
    """One value."""

    value: Any


@dataclass(frozen=True)
class Open:
    """The values of a schema, which are of some of `kinds`."""

    schema: Schema
    kinds: frozenset[str]


def arguments_of(schema: Schema) -> list[Argument]:
    """The arguments that a function names, in the order of its schema.

    Raises UnsupportedOption (`tools`) for a keyword that says more of arguments together than which
    of them there have to be, InvalidRequest for what is no schema of an object.
    """
    root = _root(schema)
    properties, required = root.get("properties", {}), root.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise InvalidRequest("properties must be an object, required a list", field="tools")
    others = root.get("additionalProperties", {})
    schemas = {**properties, **{key: others for key in required if key not in properties}}
    return [
        Argument(key=key, required=key in required, forms=_forms(one, root, _MAX_DEPTH))
        for key, one in schemas.items()
    ]


def _root(schema: Schema) -> Schema:
    if isinstance(schema.get("$ref"), str):
        found = resolved(schema["$ref"], schema)
        if isinstance(found, Mapping):
            schema = {**{key: schema[key] for key in _DEFINITIONS if key in schema}, **found}
    for keyword in schema.keys() - _SERVED:
        raise UnsupportedOption(
            f"{keyword!r} beside properties says of arguments together what cannot be said where "
            "they are written one by one",
            field="tools",
        )
    return schema


def _forms(schema: Any, root: Schema, left: int) -> tuple[Fixed | Open, ...]:
    if schema is False:
        raise InvalidRequest("an argument whose schema is false cannot be", field="tools")
    if not isinstance(schema, Mapping):
        return (Open({}, kinds_of({}, root)),)
    said = schema.keys() - _SAYS_NOTHING
    if left and said == {"$ref"} and isinstance(schema["$ref"], str):
        return _forms(resolved(schema["$ref"], root), root, left - 1)
    if "const" in schema:
        return (Fixed(schema["const"]),)
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return tuple(map(Fixed, schema["enum"]))
    for keyword in ("anyOf", "oneOf"):
        if left and said == {keyword} and isinstance(schema[keyword], list):
            branches = (_forms(one, root, left - 1) for one in schema[keyword])
            return tuple(form for forms in branches for form in forms)
    definitions = {key: root[key] for key in _DEFINITIONS if key in root}
    return (Open({**definitions, **schema}, kinds_of(schema, root)),)
