"""What each argument of a function may be, for families that write arguments one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.parsers.functions import Schema
from rollout.parsers.schema_kinds import kinds_of, resolved

_MAX_DEPTH = 32
_MAX_FORMS = 10_000
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
    forms = _Forms(root)
    found = [
        Argument(key=key, required=key in required, forms=forms.of(one, _MAX_DEPTH))
        for key, one in schemas.items()
    ]
    for argument in found:
        if not argument.forms:
            raise InvalidRequest(
                f"the schema of {argument.key[:100]!r} is nothing but itself", field="tools"
            )
    return found


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


class _Forms:
    """Writes out what schemas refer to, each place once."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._referred: dict[str, tuple[Fixed | Open, ...]] = {}

    def of(self, schema: Any, left: int) -> tuple[Fixed | Open, ...]:
        """The forms of one schema. left: how many schemas inside each other are looked into."""
        if schema is False:
            raise InvalidRequest("an argument whose schema is false cannot be", field="tools")
        if not isinstance(schema, Mapping):
            return (Open({}, kinds_of({}, self._root)),)
        said = schema.keys() - _SAYS_NOTHING
        if left and said == {"$ref"} and isinstance(schema["$ref"], str):
            return self._at(schema["$ref"], left - 1)
        if "const" in schema:
            return (Fixed(schema["const"]),)
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return tuple(map(Fixed, schema["enum"]))
        for keyword in ("anyOf", "oneOf"):
            if left and said == {keyword} and isinstance(schema[keyword], list):
                return self._any_of(schema[keyword], left - 1)
        definitions = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
        return (Open({**definitions, **schema}, kinds_of(schema, self._root)),)

    def _at(self, reference: str, left: int) -> tuple[Fixed | Open, ...]:
        if reference not in self._referred:
            self._referred[reference] = ()
            self._referred[reference] = self.of(resolved(reference, self._root), left)
        return self._referred[reference]

    def _any_of(self, schemas: Sequence[Any], left: int) -> tuple[Fixed | Open, ...]:
        found: list[Fixed | Open] = []
        for schema in schemas:
            found += self.of(schema, left)
            if len(found) > _MAX_FORMS:
                raise InvalidRequest(
                    f"an argument may be one of more than {_MAX_FORMS} values", field="tools"
                )
        return tuple(found)
