"""Write the metadata of GGUF files, for models and tokenizers that no test can download."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf


def write_gguf_metadata(path: Path, metadata: dict[str, Any], *, version: int = 3) -> Path:
    """A GGUF file with these keys and no tensors. Lists must hold values of one type."""
    body = b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, len(metadata)) + body)
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one key to a file of the gguf library, as the type that fits the value; an empty list
    is left out."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        kinds = {_kind(item) for item in value}
        assert len(kinds) == 1, "a GGUF array has one type"
        items = b"".join(_plain(item) for item in value)
        return struct.pack("<IIQ", 9, kinds.pop(), len(value)) + items
    return struct.pack("<I", _kind(value)) + _plain(value)


def _kind(value: Any) -> int:
    return {bool: 7, int: 4, float: 6, str: 8}[type(value)]


def _plain(value: Any) -> bytes:
    if isinstance(value, str):
        return _string(value)
    layout = {bool: "?", int: "<I", float: "<f"}[type(value)]
    return struct.pack(layout, value)
