"""Files of a model folder, read so that whatever is wrong with one names it and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


def broken(path: Path, key: str, what: str) -> CheckpointError:
    """The error of a key whose value cannot be used; its field is the key."""
    return CheckpointError(f"{path}: {key} {what}", field=key)


def read_text(path: Path) -> str:
    """The text of a file, with line ends as Python reads them.

    Raises CheckpointError naming the file if it cannot be read or is not UTF-8.
    """
    if not path.is_file():
        # A pipe could be read for ever.
        raise CheckpointError(f"{path} is no regular file", field="model")
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", field="model") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}", field="model") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file.

    Raises CheckpointError naming the file if it is not a JSON object.
    """
    if not path.exists():
        return {}
    return parse_object(path, read_text(path))


def parse_object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that `text`, the contents of `path`, holds. Raises CheckpointError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", field="model") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", field="model")
    return value


def optional_text(path: Path, source: dict[str, Any], key: str) -> str | None:
    """A string or nothing. Raises CheckpointError naming the key for another type."""
    value = source.get(key)
    return None if value is None else as_text(path, key, value)


def as_text(path: Path, key: str, value: Any) -> str:
    """`value` if it is text that UTF-8 can hold. Raises CheckpointError naming the key."""
    if not isinstance(value, str):
        raise broken(path, key, f"is {_shown(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise broken(path, key, f"holds half a surrogate pair: {error}") from error
    return value


def optional_flag(path: Path, source: dict[str, Any], key: str) -> bool | None:
    """true, false or nothing. Raises CheckpointError naming the key for another type."""
    value = source.get(key)
    if value is not None and not isinstance(value, bool):
        raise broken(path, key, f"is {_shown(value)}, not true or false")
    return value


def token_ids(path: Path, source: dict[str, Any], key: str) -> list[int] | None:
    """A token id or a list of them, as a list; None where the key is absent or null.

    Raises CheckpointError naming the key for anything else.
    """
    value = source.get(key)
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise broken(path, key, f"holds {_shown(item)}, not a token id")
    return listed


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
