"""Which types of JSON values a function's schema lets an argument have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rollout.parsers.functions import Schema

ALL_KINDS = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_MAX_DEPTH = 32


def argument_kinds(schema: Schema, key: str) -> frozenset[str]:
    """Types of the argument `key` of a function, as schemas name them; all where the schema does
    not tell."""
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    if found is None:
        found = schema.get("additionalProperties")
    return kinds_of(found, schema)


def kinds_of(schema: Any, root: Schema) -> frozenset[str]:
    """Types of the values of a schema within `root`."""
    return _Kinds(root).of(schema, _MAX_DEPTH)


class _Kinds:
    """Looks at every place that schemas refer to once: they may name each other in circles."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._referred: dict[str, frozenset[str]] = {}

    def of(self, schema: Any, left: int) -> frozenset[str]:
        """Types of one schema. left: how many schemas inside each other are looked into."""
        if not isinstance(schema, Mapping) or not left:
            return ALL_KINDS
        kinds = ALL_KINDS
        named = schema.get("type")
        if named is not None:
            kinds &= frozenset([named] if isinstance(named, str) else _texts(named))
        if isinstance(schema.get("enum"), list):
            kinds &= frozenset(map(_kind_of, schema["enum"]))
        if "const" in schema:
            kinds &= {_kind_of(schema["const"])}
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                kinds &= frozenset().union(*(self.of(one, left - 1) for one in schema[key]))
        for one in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
            kinds &= self.of(one, left - 1)
        if isinstance(schema.get("$ref"), str):
            kinds &= self._at(schema["$ref"], left - 1)
        return kinds or ALL_KINDS

    def _at(self, reference: str, left: int) -> frozenset[str]:
        if reference not in self._referred:
            self._referred[reference] = ALL_KINDS
            self._referred[reference] = self.of(resolved(reference, self._root), left)
        return self._referred[reference]


def resolved(reference: str, root: Schema) -> Any:
    """What a `$ref` within `root` names; None if it names nothing there."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _texts(named: Any) -> Iterable[str]:
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case _:
            return "array" if isinstance(value, list) else "object"
