"""Check the ranges of a message that was built in this process.

Decoding checks a message that comes from bytes. A message made by a caller in Python (offline, an
inline replica, a client, a route that computes a field) is checked here against the same types, so
that every path refuses the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import inspect


class OutOfRange(ValueError):
    """A value that its field does not hold. field: the path of the field in the message."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


Check = Callable[[Any, str], None]
"""Called with a value and the path of its field; raises OutOfRange."""

# What MessagePack holds where a type states no bound of its own.
_LOWEST, _HIGHEST = -(2**63), 2**64 - 1
_INF = float("inf")


def check_ranges(message: msgspec.Struct, *, skip: tuple[str, ...] = ()) -> None:
    """Raise OutOfRange, naming the field by its path, for the first value that the type of
    its field does not hold: a number out of range or not finite, a list or text too long, another
    type, text that is no UTF-8.

    skip: fields that the caller looks at by itself. Structs in fields are looked into. Some 7
    microseconds for a request with its sampling parameters.
    """
    table = _table(type(message), skip)
    for value, default, check, name in zip(
        table.values(message), table.defaults, table.checks, table.names, strict=True
    ):
        if value is not default:
            check(value, name)


class _Table(NamedTuple):
    """The fields of a struct that have a range. values: theirs, of a message. A default is in
    its range, so a field that has it needs no look."""

    names: tuple[str, ...]
    values: Callable[[Any], tuple[Any, ...]]
    defaults: tuple[Any, ...]
    checks: tuple[Check, ...]


@cache
def _table(kind: type[msgspec.Struct], skip: tuple[str, ...]) -> _Table:
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    rows = [
        (field.name, field.default, check)
        for field in found.fields
        if field.name not in skip and (check := _check_of(field.type)) is not None
    ]
    names = tuple(name for name, _, _ in rows)
    return _Table(
        names=names,
        values=_getter(names),
        defaults=tuple(default for _, default, _ in rows),
        checks=tuple(check for _, _, check in rows),
    )


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: tuple(getattr(message, name) for name in names)


def _check_of(kind: inspect.Type) -> Check | None:
    """The check of one type; None where any value will do, or another place looks."""
    match kind:
        case inspect.UnionType():
            return _union(kind)
        case inspect.IntType():
            return _integer(kind)
        case inspect.FloatType():
            return _real(kind)
        case inspect.StrType():
            return _text(kind)
        case inspect.BytesType():
            return _sized(bytes, "bytes", kind.max_length, None)
        case inspect.ListType():
            return _list(kind)
        case inspect.DictType():
            return _dict(kind)
        case inspect.StructType():
            return _struct(kind.cls)
        case inspect.LiteralType():
            return _literal(kind)
        case inspect.BoolType():
            return _plain(bool)
        case inspect.NoneType():
            return _plain(type(None))
        case inspect.CustomType() if getattr(kind.cls, "__origin__", kind.cls) is np.ndarray:
            return _array
        case _:
            return None


def _refuse(field: str, problem: str) -> None:
    """The message names the entry of a list or a dict, the error's field the list."""
    named = field[: field.rindex("[")] if field.endswith("]") else field
    raise OutOfRange(f"{field} {problem}", field=named)


def _show(value: Any) -> str:
    """The value for a message: short, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bounds(low: Any, high: Any, strict: bool = False) -> str:
    if low == -_INF:
        return f"a number up to {high:g}"
    return f"a number above {low:g} up to {high:g}" if strict else f"{low:g} to {high:g}"


def _integer(kind: inspect.IntType) -> Check:
    low = _LOWEST if kind.ge is None else kind.ge
    high = _HIGHEST if kind.le is None else kind.le

    def check(value: Any, field: str) -> None:
        if type(value) is not int:
            _refuse(field, f"is {_show(value)} ({type(value).__name__}); give an int")
        if not low <= value <= high:
            _refuse(field, f"is {_show(value)}; give an integer from {low} to {high}")

    return check


def _real(kind: inspect.FloatType) -> Check:
    strict = kind.gt is not None
    low = kind.gt if strict else -_INF if kind.ge is None else kind.ge
    high = kind.le if kind.le is not None else _INF
    assert low is not None

    def check(value: Any, field: str) -> None:
        # numpy.float64 is a float; other types of numpy cannot be sent.
        if type(value) is not int and not isinstance(value, float):
            _refuse(field, f"is {_show(value)} ({type(value).__name__}); give a float")
        # A NaN fails both comparisons.
        if not low <= value <= high or (strict and value == low):
            _refuse(field, f"is {_show(value)}; give {_bounds(low, high, strict)}")

    return check


def _text(kind: inspect.StrType) -> Check:
    longest = kind.max_length

    def check(value: Any, field: str) -> None:
        if not isinstance(value, str):
            _refuse(field, f"is {_show(value)}; give text")
        if longest is not None and len(value) > longest:
            _refuse(field, f"has {len(value)} characters; the most is {longest}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                _refuse(field, "has half of a surrogate pair, which is no character")

    return check


def _sized(kind: type, unit: str, longest: int | None, each: Check | None) -> Check:
    def check(value: Any, field: str) -> None:
        if not isinstance(value, kind):
            _refuse(field, f"is {_show(value)}; give a {kind.__name__}")
        if longest is not None and len(value) > longest:
            _refuse(field, f"has {len(value)} {unit}; the most is {longest}")
        if each is not None:
            for number, item in enumerate(value):
                each(item, f"{field}[{number}]")

    return check


def _list(kind: inspect.ListType) -> Check:
    each = _check_of(kind.item_type)
    if not isinstance(kind.item_type, inspect.IntType):
        return _sized(list, "entries", kind.max_length, each)
    whole = _sized(list, "entries", kind.max_length, each)
    low = _LOWEST if kind.item_type.ge is None else kind.item_type.ge
    high = _HIGHEST if kind.item_type.le is None else kind.item_type.le
    length = kind.max_length

    def check(value: Any, field: str) -> None:
        # Token ids and shapes: one pass without a path for each, unless one is wrong.
        if type(value) is list and (length is None or len(value) <= length):
            for item in value:
                if type(item) is not int or not low <= item <= high:
                    break
            else:
                return
        whole(value, field)

    return check


def _dict(kind: inspect.DictType) -> Check:
    key_check, value_check = _check_of(kind.key_type), _check_of(kind.value_type)
    whole = _sized(dict, "entries", kind.max_length, None)

    def check(value: Any, field: str) -> None:
        whole(value, field)
        for key, item in value.items():
            if key_check is not None:
                key_check(key, field)
            if value_check is not None:
                value_check(item, f"{field}[{key}]")

    return check


def _struct(kind: type[msgspec.Struct]) -> Check:
    def check(value: Any, field: str) -> None:
        if not isinstance(value, kind):
            _refuse(field, f"is {_show(value)}; give a {kind.__name__}")
        try:
            check_ranges(value)
        except OutOfRange as error:
            path = f"{field}.{error.field}"
            message = error.message.replace(error.field, path, 1)
            raise OutOfRange(message, field=path) from None

    return check


def _literal(kind: inspect.LiteralType) -> Check:
    words = kind.values

    def check(value: Any, field: str) -> None:
        if not isinstance(value, (str, int)) or value not in words:
            _refuse(field, f"is {_show(value)}; give one of {', '.join(map(str, words))}")

    return check


def _array(value: Any, field: str) -> None:
    """Values and shape are left to whoever knows what they mean."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        _refuse(field, f"is {_show(value)}; give a numpy array of numbers")


def _plain(kind: type) -> Check:
    def check(value: Any, field: str) -> None:
        if type(value) is not kind:
            _refuse(field, f"is {_show(value)}; give a {kind.__name__}")

    return check


# The type of Python whose values a member of a union takes; a literal takes its words' type.
_PYTHON: dict[type[inspect.Type], type] = {
    inspect.NoneType: type(None),
    inspect.BoolType: bool,
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.StrType: str,
    inspect.BytesType: bytes,
    inspect.ListType: list,
    inspect.DictType: dict,
}


def _union(kind: inspect.UnionType) -> Check | None:
    """By the value's own type: the check of the member that takes it. Unions of structs, and of
    a literal with None, are told apart by class and by value."""
    by_type: dict[type, Check | None] = {}
    for member in kind.types:
        if isinstance(member, inspect.StructType):
            by_type[member.cls] = _check_of(member)
        elif isinstance(member, inspect.LiteralType):
            by_type.update((type(word), _check_of(member)) for word in member.values)
        elif type(member) in _PYTHON:
            by_type[_PYTHON[type(member)]] = _check_of(member)
        else:
            return None
    if float in by_type and int not in by_type:
        by_type[int] = by_type[float]
    names = ", ".join(sorted(each.__name__ for each in by_type))

    def check(value: Any, field: str) -> None:
        taker = next((each for each in type(value).__mro__ if each in by_type), None)
        if taker is None:
            _refuse(field, f"is {_show(value)}; give one of {names}")
        elif (own := by_type[taker]) is not None:
            own(value, field)

    return check
