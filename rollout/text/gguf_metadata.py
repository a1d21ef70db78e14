"""The metadata of a GGUF file, read alone.

`gguf.GGUFReader` maps each array element to a numpy view, which takes seconds for a
vocabulary; the tokenizer needs only the key-value section, read here front to back.
Layout: the GGUF specification of the ggml project (docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.errors import CheckpointError, ModelNotFound

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING = 8
_ARRAY = 9


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Every key of the file's metadata: str, bool, int, float, or a list of one of them.

    Raises ModelNotFound if there is no such file, CheckpointError if it is not GGUF.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(f"no GGUF file at {path}", field="model")
    with path.open("rb") as file:
        try:
            return _read_section(file, path)
        except (
            struct.error,
            UnicodeDecodeError,
            MemoryError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{path} ends or breaks inside its GGUF metadata ({error}); fetch it again",
                field="model",
            ) from error


def _read_section(file: BinaryIO, path: Path) -> dict[str, Any]:
    magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it begins {magic!r}", field="model")
    version, _num_tensors, num_keys = _unpack(file, "<IQQ")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; 2 and 3 are read", field="model")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _read_string(file)
        (kind,) = _unpack(file, "<I")
        metadata[key] = _read_value(file, kind)
    return metadata


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    data = file.read(length)
    if len(data) != length:
        raise struct.error(f"a string of {length} bytes is cut")
    return data.decode("utf-8")


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_string(file)
    if kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        if inner in _SCALARS:
            return _read_scalars(file, inner, count)
        return [_read_value(file, inner) for _ in range(count)]
    return _read_scalars(file, kind, 1)[0]


def _read_scalars(file: BinaryIO, kind: int, count: int) -> list[Any]:
    if kind not in _SCALARS:
        raise struct.error(f"unknown value type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise struct.error(f"an array of {count} values is cut")
    values: list[Any] = np.frombuffer(data, dtype).tolist()
    return values
