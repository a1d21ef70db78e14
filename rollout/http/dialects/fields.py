"""Types of fields that both control dialects share: their ranges, and folders named in bodies."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from engine.errors import InvalidRequest

Port = Annotated[int, Meta(ge=0, le=65535)]
Rank = Annotated[int, Meta(ge=0, le=1 << 20)]
WorldSize = Annotated[int, Meta(ge=1, le=1 << 20)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
"""Deadline of one call."""
Wait = Annotated[float, Meta(ge=0, le=3600)]
"""How long a caller would wait, 0 included."""
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Label = Annotated[str, Meta(max_length=1024)]
"""What a version is called; any text."""
Names = Annotated[list[Name], Meta(max_length=1 << 20)]
Words = Annotated[list[str], Meta(max_length=1 << 20)]
Dimension = Annotated[int, Meta(ge=0, le=1 << 40)]
Shape = Annotated[list[Dimension], Meta(max_length=8)]
Shapes = Annotated[list[Shape], Meta(max_length=1 << 20)]
Count = Annotated[int, Meta(ge=0, le=1 << 20)]
ChunkBytes = Annotated[int, Meta(ge=1, le=1 << 40)]
PulledVersion = Annotated[int, Meta(ge=0, le=999_999)]

_MAX_PATH = 4096


def folder(text: str, field: str) -> str:
    """A path of this machine, as a body names it: absolute and printable.

    Raises InvalidRequest naming `field`; whether the path is there is found out by its reader.
    """
    why = ""
    if not text.strip():
        why = "is empty"
    elif len(text.encode()) > _MAX_PATH:
        why = f"is longer than {_MAX_PATH} bytes"
    elif not text.isprintable():
        why = "has characters that are not printable"
    elif not text.startswith("/"):
        why = f"is {text!r}, relative to no folder that both sides know"
    if why:
        raise InvalidRequest(f"{field} {why}; send an absolute path", field=field)
    return text
