"""JSON of callers into types: the one place where what is wrong with it becomes InvalidRequest.

The server's routes, query strings and files of requests are read through here.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from rollout.requests.nulls import without_nulls

MAX_DEPTH = 100
"""Most lists and objects inside each other in a part of a body that has no type of its own."""

_PATH = re.compile(r"at `\$\.?([^`]*)`$")
_KEY_PATH = re.compile(r"at `key` in `\$\.?([^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `([^`]+)`")


def decode_json(
    data: bytes | str | msgspec.Raw,
    kind: Any,
    *,
    strict: bool = True,
    field: str = "body",
    what: str = "the body",
) -> Any:
    """`data` as a value of type `kind`, whose ranges and lengths are checked on the way. A field
    that is null has its default (`nulls`).

    strict: off, numbers may be written as text. Raises InvalidRequest: with the path of the
    field whose value does not fit, or with `field` where `data` (called `what`) is no JSON.
    """
    try:
        return msgspec.json.decode(without_nulls(data, kind), type=kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _misfit(error) from error
    except RecursionError as error:
        raise InvalidRequest(
            f"{what} has lists or objects nested too deeply; the most is {MAX_DEPTH}", field=field
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        # UnicodeDecodeError is a ValueError.
        raise InvalidRequest(f"{what} is not a JSON object: {error}", field=field) from error


def convert(value: Any, kind: Any, *, strict: bool = True, field: str = "") -> Any:
    """Plain objects as a value of type `kind`; errors as in `decode_json`, below `field`."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        found = _misfit(error)
        raise InvalidRequest(found.message, field=field or found.field) from error
    except (RecursionError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{field or 'a value'} does not fit: {error}", field=field) from error


def _misfit(error: msgspec.ValidationError) -> InvalidRequest:
    """What msgspec says of a value that is not of its field's type, or is not there, with the
    field's path."""
    message = str(error)
    path = _PATH.search(message) or _KEY_PATH.search(message)
    missing = _MISSING.search(message)
    parts = [found.group(1) for found in (path, missing) if found is not None]
    return InvalidRequest(message, field=".".join(part for part in parts if part))


def check_depth(value: Any, field: str) -> None:
    """Raise InvalidRequest (`field`) for lists and objects more than MAX_DEPTH deep.

    Decoders, encoders and templates recurse; how deep they can depends on the Python.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise InvalidRequest(f"{field} is nested more than {MAX_DEPTH} deep", field=field)
