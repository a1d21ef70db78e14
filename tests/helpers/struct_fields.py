"""The fields of a message of the protocol, and the least message that has all it must have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect


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
