"""The places of a JSON Schema at which values stand, as a reader of their text has to know them.

A text may go on in the same ways whatever the values were that are whole, where the schema says
of each what it may be, whatever the others are. That is so for the values of plain objects and
lists. Of anything else (`enum`, `pattern`, parts of `anyOf` that begin alike, `allOf`) nothing is
said here, and the characters of a value decide how it may go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from rollout.masks.states.integers import AnyNumber, Integers, Numbers

Kind = Literal["string", "object", "array", "number"]

_SILENT = frozenset(
    {"title", "description", "default", "examples", "$schema", "$comment", "$defs", "definitions"}
    | {"readOnly", "writeOnly", "x-guidance"}
)
"""Keywords that restrict nothing."""
_OF_KINDS: Mapping[Kind, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "number": frozenset({"minimum", "maximum"}),
}
"""Keywords that are known; of a kind whose values any other restricts, nothing is said."""
_OTHERS: Mapping[Kind, frozenset[str]] = {
    "string": frozenset({"pattern", "format"}),
    "object": frozenset({"patternProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"additionalItems", "uniqueItems"}),
    "number": frozenset({"exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
}
_KEYWORDS = frozenset({"type"}).union(*_OF_KINDS.values(), *_OTHERS.values())
_CHOICES = frozenset({"anyOf", "oneOf"})
_GIVEN = frozenset({"enum", "const"})


@dataclass(frozen=True)
class Texts:
    """Strings of `least` to `most` characters; most None: any number of them."""

    least: int
    most: int | None

    def counted(self, num_chars: int) -> int:
        """As much of how many came as matters."""
        return min(num_chars, self.least) if self.most is None else num_chars


@dataclass(frozen=True, eq=False)
class Members:
    """Objects whose values may each be what it may be. named: by name, its number in the order of
    the schema, and the place of its value. others: that of values of other names, if they may
    come."""

    named: Mapping[str, tuple[int, Place]]
    others: Place | None


@dataclass(frozen=True, eq=False)
class Items:
    """Lists whose values may each be what it may be."""

    first: tuple[Place, ...]
    others: Place | None
    least: int
    most: int | None

    def of(self, index: int) -> Place | None:
        """The place of a value."""
        return self.first[index] if index < len(self.first) else self.others

    def behind(self, index: int) -> int:
        """The index of the next value, as much of it as matters."""
        enough = max(self.least, len(self.first))
        return min(index + 1, enough) if self.most is None else index + 1


class Place:
    """Where a value stands. Of each kind of values, what is known of those that may stand there;
    None where nothing is."""

    def __init__(self, schema: Any, root: Any) -> None:
        """root: the whole schema, into which references lead."""
        self._schema = schema
        self._root = root

    @cached_property
    def strings(self) -> Texts | None:
        """Strings."""
        schema = self._only("string")
        if schema is None:
            return None
        return Texts(int(schema.get("minLength", 0)), _count(schema.get("maxLength")))

    @cached_property
    def objects(self) -> Members | None:
        """Objects."""
        schema = self._only("object")
        if schema is None:
            return None
        properties = schema.get("properties", {})
        # Names that have to come beside those of the schema come at places of their own.
        if not set(schema.get("required", ())) <= properties.keys():
            return None
        others = schema.get("additionalProperties", True)
        return Members(
            {name: (n, self._at(inner)) for n, (name, inner) in enumerate(properties.items())},
            None if others is False else self._at(others),
        )

    @cached_property
    def arrays(self) -> Items | None:
        """Lists."""
        schema = self._only("array")
        if schema is None or isinstance(schema.get("items"), list):
            return None
        others = schema.get("items", True)
        return Items(
            tuple(self._at(inner) for inner in schema.get("prefixItems", ())),
            None if others is False else self._at(others),
            int(schema.get("minItems", 0)),
            _count(schema.get("maxItems")),
        )

    @cached_property
    def numbers(self) -> Numbers | None:
        """Numbers."""
        schema = self._only("number")
        if schema is None:
            return None
        bounds = schema.get("minimum"), schema.get("maximum")
        types = _types(schema)
        if "number" in types:
            return AnyNumber() if bounds == (None, None) else None
        if any(bound is not None and not isinstance(bound, int) for bound in bounds):
            return None
        return Integers(*bounds)

    def _at(self, schema: Any) -> Place:
        return Place(schema, self._root)

    def _only(self, kind: Kind) -> dict[str, Any] | None:
        """The one schema that every value of a kind has to fit; None where there is none, or more,
        or one that says more than is known here."""
        found = list(islice(_leaves(self._schema, self._root, kind, set()), 2))
        if len(found) != 1 or found[0] is None or _OTHERS[kind] & found[0].keys():
            return None
        return found[0]


def _leaves(schema: Any, root: Any, kind: Kind, met: set[int]) -> Iterator[dict[str, Any] | None]:
    """The schemas of which a value of that kind has to fit one; None for each that is not
    understood. met: what was looked at, which is skipped the second time."""
    if schema is True:
        yield {}
    if isinstance(schema, bool) or id(schema) in met:
        return
    met.add(id(schema))
    said = schema.keys() - _SILENT
    if said == {"$ref"}:
        found = _referred(schema["$ref"], root)
        yield from [None] if found is None else _leaves(found, root, kind, met)
    elif len(said) == 1 and (keyword := min(said)) in _CHOICES:
        for part in schema[keyword]:
            yield from _leaves(part, root, kind, met)
    elif said & _GIVEN:
        values = [*schema.get("enum", ()), *([schema["const"]] if "const" in said else ())]
        if any(_kind_of(value) == kind for value in values):
            yield None
    elif not said <= _KEYWORDS:
        yield None
    elif _types(schema) & _NAMES[kind]:
        yield schema


_NAMES: Mapping[Kind, frozenset[str]] = {
    "string": frozenset({"string"}),
    "object": frozenset({"object"}),
    "array": frozenset({"array"}),
    "number": frozenset({"number", "integer"}),
}


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema names; all where it names none."""
    said = schema.get("type")
    if said is None:
        return frozenset().union(*_NAMES.values())
    return frozenset([said] if isinstance(said, str) else said)


def _kind_of(value: Any) -> Kind | None:
    """The kind of a value of JSON; None of those that are words."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    if isinstance(value, dict):
        return "object"
    return "array" if isinstance(value, list) else None


def _referred(ref: str, root: Any) -> Any:
    """What a reference into the schema itself leads to, by JSON Pointer (RFC 6901); None where it
    leads nowhere, or that is not known."""
    if "%" in ref:
        return None
    found = root
    for part in ref.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found if isinstance(found, (dict, bool)) else None


def _count(value: Any) -> int | None:
    return None if value is None else int(value)
