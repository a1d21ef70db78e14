"""Refuse a message of this process whose values its types do not hold."""

from __future__ import annotations

import msgspec

from engine.errors import InvalidRequest
from engine.protocol.ranges import OutOfRange
from engine.protocol.ranges import check_ranges as _check


def check_ranges(message: msgspec.Struct, *, skip: tuple[str, ...] = ()) -> None:
    """Raise InvalidRequest, naming the field, for the first value out of its range.

    Whoever sends a request or a command that did not come from bytes calls this first; see
    `engine.protocol.ranges.check_ranges`.
    """
    try:
        _check(message, skip=skip)
    except OutOfRange as error:
        raise InvalidRequest(error.message, field=error.field) from None
