"""Versions and folders that bodies of the control dialects name."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from engine.errors import InvalidRequest

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
