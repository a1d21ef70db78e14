"""What a run and its graders' processes tell each other: a length in 4 bytes, little-endian, and
JSON."""

from __future__ import annotations

import json
import os
from typing import Any


def write_frame(sink: int, value: dict[str, Any]) -> None:
    """Write one frame to a file descriptor. Raises BrokenPipeError if the reader is gone.

    See `to_json`."""
    data = to_json(value)
    rest = memoryview(len(data).to_bytes(4, "little") + data)
    while rest:
        rest = rest[os.write(sink, rest) :]


def to_json(value: dict[str, Any]) -> bytes:
    """A value as JSON. What JSON has no word for, such as a date among a problem's columns, becomes
    text, and an array of numpy a list."""
    return json.dumps(value, default=_plain).encode()


def read_frame(source: int) -> dict[str, Any] | None:
    """The next frame of a file descriptor; None at its end."""
    head = _read(source, 4)
    data = None if head is None else _read(source, int.from_bytes(head, "little"))
    if data is None:
        return None
    found: dict[str, Any] = json.loads(data)
    return found


def _read(source: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(source, size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _plain(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else str(value)
