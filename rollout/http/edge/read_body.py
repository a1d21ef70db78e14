"""Read bodies and query strings of dialects into structs, and pieces both dialects share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from engine.errors import InvalidRequest
from engine.protocol import ITEM_BYTES, TensorPiece
from rollout.requests.json_types import convert, decode_json

T = TypeVar("T", bound=msgspec.Struct)

_MAX_TENSOR_BYTES = 1 << 44


async def whole_body(request: Request) -> bytes:
    """The body, to be read once. Raises ClientDisconnect."""
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as `kind`; an empty body as an empty object. Fields that `kind` has not
    are passed over: clients of one dialect differ in them. Raises InvalidRequest."""
    data = await request.body() or b"{}"
    found: T = decode_json(data, kind, strict=False)
    return found


async def read_body_or_query(request: Request, kind: type[T]) -> T:
    """The body of a POST, the query of a GET; a name that comes several times is a list."""
    if request.method == "POST" and await request.body():
        return await read_body(request, kind)
    return read_query(request, kind)


def read_query(request: Request, kind: type[T]) -> T:
    """The query string as `kind`. Raises InvalidRequest naming the parameter."""
    query = request.query_params
    lists = {field.name for field in msgspec.structs.fields(kind) if _is_list(field.type)}
    values = {name: query.getlist(name) if name in lists else query[name] for name in query}
    found: T = convert(values, kind, strict=False)
    return found


def _is_list(kind: Any) -> bool:
    """Whether a type is a list, bounded or optional ones included."""
    return get_origin(kind) is list or (
        get_origin(kind) in (Annotated, Union, UnionType) and any(map(_is_list, get_args(kind)))
    )


def pieces(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> list[TensorPiece]:
    """The announced tensors. Raises InvalidRequest if the lists do not match each other or a
    dtype is unknown."""
    if not names:
        raise InvalidRequest("names is empty; announce the tensors that will come", field="names")
    for field, values in (("dtypes", dtypes), ("shapes", shapes)):
        if len(values) != len(names):
            raise InvalidRequest(
                f"{field} has {len(values)} entries for {len(names)} names", field=field
            )
    found = []
    for index, (name, dtype, shape) in enumerate(zip(names, dtypes, shapes, strict=True)):
        if not name:
            raise InvalidRequest(f"names[{index}] is empty", field=f"names[{index}]")
        plain = dtype.removeprefix("torch.")
        if plain not in ITEM_BYTES:
            raise InvalidRequest(
                f"dtypes[{index}] of {name} is {dtype!r}; known are {', '.join(ITEM_BYTES)}",
                field=f"dtypes[{index}]",
            )
        if math.prod(shape) * ITEM_BYTES[plain] > _MAX_TENSOR_BYTES:
            raise InvalidRequest(
                f"shapes[{index}] of {name} is {list(shape)}, more than any tensor has",
                field=f"shapes[{index}]",
            )
        found.append(TensorPiece(name, plain, list(shape)))
    return found
