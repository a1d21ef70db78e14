"""JSON Schemas: what of them is served, where one is not, and the form that llguidance reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rollout.masks.grammar.languages.bounds import MAX_DEPTH, refuse

MOST_WHITESPACE = 64
WHITESPACE = rf"[ \t\r\n]{{1,{MOST_WHITESPACE}}}"
"""What may stand where JSON allows whitespace: as much as a deep indentation takes, and not more,
since a model that has lost its way would write it to the end of its length."""

Schema = dict[str, Any]

_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTS_OF_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalProperties", "additionalItems"})

_UNSERVED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "$dynamicRef": (),
        "$recursiveRef": (),
        "contains": (),
        "dependencies": ({},),
        "dependentRequired": ({},),
        "dependentSchemas": ({},),
        "else": (),
        "if": (),
        "maxContains": (),
        "minContains": (),
        "not": (False,),
        "propertyNames": (True, {}),
        "then": (),
        "unevaluatedItems": (True, {}),
        "unevaluatedProperties": (True, {}),
        "uniqueItems": (False,),
        "x-guidance": ({},),
    }
)
"""Keywords that would restrict a value and that no mask enforces, with what asks for nothing."""

_ANNOTATIONS = frozenset({"$vocabulary", "$dynamicAnchor", "contentSchema", "deprecated"})
"""Keywords that restrict nothing, which llguidance does not know as such."""

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_FORMATS = (
    "date-time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uri",
    "uuid",
)


def read_json(source: str, what: str) -> Any:
    """A source that is JSON text, at most `MAX_DEPTH` deep, of numbers that float64 has and texts
    that UTF-8 has. Raises InvalidRequest."""
    try:
        value = json.loads(source, parse_constant=lambda name: refuse(f"{what} has {name}"))
    except ValueError as error:
        refuse(f"{what} is no JSON: {error}")
    except RecursionError:
        refuse(f"{what} is nested more than {MAX_DEPTH} deep")
    _check_depth(value, what)
    _check_leaves("#", value, what)
    return value


def served_schema(value: Any, place: str = "#") -> Schema:
    """A schema in the form that llguidance is given: what asks for nothing is left out, and its
    options are ours. place: where it stands.

    Raises InvalidRequest naming the place, as a JSON Pointer (RFC 6901), of what is not served or
    is no JSON Schema.
    """
    if value is True:
        value = {}
    return {"x-guidance": {"whitespace_pattern": WHITESPACE}, **_served(value, place)}


def subschemas(schema: Any, place: str = "#") -> Iterator[tuple[str, Schema]]:
    """The schemas inside a schema that `served_schema` gave, each before those inside it, with
    their places."""
    for where, inner in _inner(schema, place):
        if isinstance(inner, dict):
            yield where, inner
            yield from subschemas(inner, where)


def _check_depth(value: Any, what: str) -> None:
    level = [("#", value)]
    for _ in range(MAX_DEPTH + 1):
        level = [found for place, outer in level for found in _parts(place, outer)]
        if not level:
            return
    refuse(f"{what} is nested more than {MAX_DEPTH} deep, at {level[0][0][:200]}")


def _check_leaves(place: str, value: Any, what: str) -> None:
    """Of a value whose depth was checked."""
    if isinstance(value, float) and not math.isfinite(value):
        refuse(f"{what} has a number beyond the range of float64, at {place[:200]}")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        refuse(f"{what} has a text with half a surrogate pair, at {place[:200]}")
    if isinstance(value, list):
        for number, inner in enumerate(value):
            _check_leaves(_at(place, number), inner, what)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_leaves(place, name, what)
            _check_leaves(_at(place, name), inner, what)


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The lists and objects of a list or an object."""
    if isinstance(value, (dict, list)):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((_at(place, n), inner) for n, inner in named if isinstance(inner, (dict, list)))


def _served(schema: Any, place: str) -> Schema:
    if not isinstance(schema, dict):
        _wrong(place, f"is {_show(schema)}; a schema is an object")
    found: Schema = {}
    for keyword, value in schema.items():
        where = _at(place, keyword)
        if keyword in _UNSERVED:
            if not any(value is neutral or value == neutral for neutral in _UNSERVED[keyword]):
                refuse(
                    f"{where}: the keyword {keyword!r} is not served, since no mask enforces it; "
                    "leave it out"
                )
        elif keyword not in _ANNOTATIONS:
            found[keyword] = _value(keyword, value, where)
    # Names beside the schema's own may come twice, and are then one property.
    most = len(set(found.get("required", ()))) + 1
    if found.get("minProperties", 0) > most:
        _wrong(_at(place, "minProperties"), f"is more than {most}, one above what is required")
    return found


def _value(keyword: str, value: Any, where: str) -> Any:
    """What a keyword says, with the schemas in it served."""
    if keyword in _OF_SCHEMAS:
        _check(where, value, dict, "an object of schemas")
        return {name: _any_schema(inner, _at(where, name)) for name, inner in value.items()}
    if keyword in _LISTS_OF_SCHEMAS or (keyword == "items" and isinstance(value, list)):
        _check(where, value, list, "a list of schemas")
        return [_any_schema(inner, _at(where, at)) for at, inner in enumerate(value)]
    if keyword in _SCHEMAS:
        return _any_schema(value, where)
    if keyword in _CHECKS:
        _CHECKS[keyword](where, value)
    return value


def _any_schema(value: Any, place: str) -> Any:
    return value if isinstance(value, bool) else _served(value, place)


def _check_type(where: str, value: Any) -> None:
    for name in value if isinstance(value, list) else [value]:
        if name not in _TYPES:
            _wrong(where, f"is {_show(name)}; give one of {', '.join(_TYPES)}")


def _check_format(where: str, value: Any) -> None:
    if value not in _FORMATS:
        _wrong(where, f"{_show(value)} is not served; give one of {', '.join(_FORMATS)}")


def _check_ref(where: str, value: Any) -> None:
    if not isinstance(value, str) or not value.startswith("#"):
        _wrong(where, f"is {_show(value)}; only places of the same schema are served, '#/...'")


def _check_required(where: str, value: Any) -> None:
    _check(where, value, list, "a list of names")
    for at, name in enumerate(value):
        _check(_at(where, at), name, str, "a name")


def _check_count(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _wrong(where, f"is {_show(value)}; give a count")


def _check_number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _wrong(where, f"is {_show(value)}; give a number")


def _check_divisor(where: str, value: Any) -> None:
    _check_number(where, value)
    if value <= 0:
        _wrong(where, f"is {_show(value)}; give a number above 0")


def _check_bound(where: str, value: Any) -> None:
    # Draft 4 has booleans here.
    if not isinstance(value, bool):
        _check_number(where, value)


def _check_list(where: str, value: Any) -> None:
    _check(where, value, list, "a list of values")
    if not value:
        _wrong(where, "is empty, so that no value fits")


def _check_text(where: str, value: Any) -> None:
    _check(where, value, str, "text")


_CHECKS: Mapping[str, Callable[[str, Any], None]] = MappingProxyType(
    {
        "$ref": _check_ref,
        "enum": _check_list,
        "exclusiveMaximum": _check_bound,
        "exclusiveMinimum": _check_bound,
        "format": _check_format,
        "maxItems": _check_count,
        "maxLength": _check_count,
        "maxProperties": _check_count,
        "maximum": _check_number,
        "minItems": _check_count,
        "minLength": _check_count,
        "minProperties": _check_count,
        "minimum": _check_number,
        "multipleOf": _check_divisor,
        "pattern": _check_text,
        "required": _check_required,
        "type": _check_type,
    }
)


def _inner(schema: Schema, place: str) -> Iterator[tuple[str, Any]]:
    """The schemas right inside a schema, with their places."""
    for keyword, value in schema.items():
        where = _at(place, keyword)
        if keyword in _OF_SCHEMAS:
            yield from ((_at(where, name), inner) for name, inner in value.items())
        elif keyword in _LISTS_OF_SCHEMAS or (keyword == "items" and isinstance(value, list)):
            yield from ((_at(where, at), inner) for at, inner in enumerate(value))
        elif keyword in _SCHEMAS:
            yield where, value


def _check(where: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        _wrong(where, f"is {_show(value)}; give {what}")


def _wrong(where: str, problem: str) -> None:
    refuse(f"{where} {problem}")


def _at(place: str, name: str | int) -> str:
    return f"{place}/{str(name).replace('~', '~0').replace('/', '~1')}"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
