"""JSON null at a field of a message: as if the field were not there.

Clients write out what was not set (`model_dump()` of the OpenAI package, serialisers of other
languages), so a null asks for the default of its field, in every body and every file of requests.
`json_types.decode_json` reads all of them through here. What lies in a value without a type of its
own (messages, JSON schemas) is the client's, and its nulls stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import Raw, inspect

_NULL = b"null"
_Fields = dict[str, Raw]


def without_nulls(data: bytes | str | Raw, kind: Any) -> bytes | str | Raw:
    """JSON text for the type `kind` without the fields of structs, nested ones included, that
    are null; `data` itself where there are none.

    Raises what msgspec raises for data that is no JSON.
    """
    found = _type_info(kind)
    if not _has_fields(found):
        return data
    text = data.encode() if isinstance(data, str) else bytes(data)
    return _stripped(text, found) or data


@cache
def _type_info(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _stripped(text: bytes, kind: inspect.Type) -> bytes | None:
    """The text without null fields; None if it has none."""
    if _NULL not in text:
        return None
    start = text.lstrip()[:1]
    if isinstance(kind, inspect.UnionType):
        chosen = _chosen(text, kind) if start == b"{" else _list_of(kind)
        return None if chosen is None else _stripped(text, chosen)
    if isinstance(kind, inspect.StructType) and start == b"{" and not kind.array_like:
        return _stripped_object(text, kind)
    if isinstance(kind, inspect.ListType) and start == b"[" and _has_fields(kind.item_type):
        return _stripped_list(text, kind.item_type)
    return None


def _stripped_object(text: bytes, kind: inspect.StructType) -> bytes | None:
    fields = msgspec.json.decode(text, type=_Fields)
    kinds = {field.encode_name: field.type for field in kind.fields}
    kept: _Fields = {}
    changed = False
    for name, raw in fields.items():
        value = bytes(raw)
        if value == _NULL:
            changed = True
            continue
        inner = _stripped(value, kinds[name]) if name in kinds else None
        changed |= inner is not None
        kept[name] = raw if inner is None else Raw(inner)
    return msgspec.json.encode(kept) if changed else None


def _stripped_list(text: bytes, kind: inspect.Type) -> bytes | None:
    found = msgspec.json.decode(text, type=list[Raw])
    items = [(raw, _stripped(bytes(raw), kind)) for raw in found]
    if all(inner is None for _, inner in items):
        return None
    return msgspec.json.encode([raw if inner is None else Raw(inner) for raw, inner in items])


def _chosen(text: bytes, kind: inspect.UnionType) -> inspect.StructType | None:
    """The struct of a union that an object is meant for: the only one, or the one of its tag."""
    structs = [found for found in kind.types if isinstance(found, inspect.StructType)]
    if len(structs) == 1:
        return structs[0]
    fields = msgspec.json.decode(text, type=_Fields)
    for found in structs:
        tag = fields.get(found.tag_field or "")
        if tag is not None and bytes(tag) == msgspec.json.encode(found.tag):
            return found
    return None


def _list_of(kind: inspect.UnionType) -> inspect.ListType | None:
    return next((found for found in kind.types if isinstance(found, inspect.ListType)), None)


def _has_fields(kind: inspect.Type) -> bool:
    """Whether values of this type are structs, or lists of them."""
    if isinstance(kind, inspect.UnionType):
        return any(map(_has_fields, kind.types))
    if isinstance(kind, inspect.ListType):
        return _has_fields(kind.item_type)
    return isinstance(kind, inspect.StructType)
