"""Any JSON value at any field: fragments of JSON text, and bodies with one field replaced.

Text rather than objects: numbers such as 1e999 and half a surrogate pair exist on the wire only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

EXTREMES = (
    "null",
    "true",
    "false",
    "0",
    "-0",
    "-1",
    "1",
    "1.0",
    "-0.0",
    "1e-400",
    "1e-46",
    "1e39",
    "-1e39",
    "1e308",
    "1e999",
    "-1e999",
    "2147483647",
    "2147483648",
    "-2147483649",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551615",
    "18446744073709551616",
    "1" + "0" * 400,
    "9" * 5000,
    '""',
    '"0"',
    '"nan"',
    '"inf"',
    '"1e308"',
    '"' + "9" * 26 + '"',
    '"' + "x" * 5000 + '"',
    '"/proc/self/mem"',
    '"é\\u0000"',
    '"\\ud800"',
    '"a\\udc00"',
    "[]",
    "[null]",
    "[[]]",
    "{}",
    '{"": 0}',
    "[" * 5000 + "]" * 5000,
    '{"a":' * 5000 + "0" + "}" * 5000,
    "[" * 150 + "]" * 150,
    "[" + ",".join(["1"] * 5000) + "]",
    "[" + ",".join(['"a"'] * 5000) + "]",
    "NaN",
    "Infinity",
    "[1,",
    "",
)
"""Values that no storage holds, of the wrong type, too long, too deep, or no JSON at all."""


def fragments() -> st.SearchStrategy[str]:
    """JSON text of any value, with those of `EXTREMES` often."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(-(2**66), 2**66)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8"), max_size=20)
    )
    nested = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=8,
    )
    return st.sampled_from(EXTREMES) | nested.map(json.dumps)


def replaced(base: Mapping[str, Any], path: tuple[str, ...], fragment: str) -> str:
    """The object `base` as JSON text, with `fragment` at the field that `path` leads to."""
    name, *rest = path
    value = replaced(base.get(name) or {}, tuple(rest), fragment) if rest else fragment
    items = {key: json.dumps(other) for key, other in base.items() if key != name}
    items[name] = value
    return "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in items.items()) + "}"


def paths(kind: type[msgspec.Struct]) -> Iterator[tuple[str, ...]]:
    """Every field of a message, and every field of the structs in it and in its lists."""
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    for field in found.fields:
        yield (field.encode_name,)
        if isinstance(field.type, inspect.StructType):
            yield from ((field.encode_name, *rest) for rest in paths(field.type.cls))


def example(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A message with the smallest values that its required fields take, its tag included."""
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    values = {} if found.tag_field is None else {found.tag_field: found.tag}
    return values | {
        field.encode_name: _least(field.type) for field in found.fields if field.required
    }


def _least(kind: inspect.Type) -> Any:
    match kind:
        case inspect.IntType():
            return max(kind.ge or 0, 0)
        case inspect.FloatType():
            return 1.0
        case inspect.StrType():
            return "a"
        case inspect.BytesType():
            return ""
        case inspect.BoolType():
            return False
        case inspect.ListType():
            return []
        case inspect.DictType():
            return {}
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.StructType():
            return example(kind.cls)
        case _:
            return None
