"""The header of a GGUF file (ggml-org/ggml docs/gguf.md, versions 2 and 3): metadata, and where
its tensors lie.

The engine reads sizes and tensors of it, the tokenizer the strings. `gguf.GGUFReader` makes a
numpy view of each array element, which takes seconds for a vocabulary.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_BROKEN = (
    struct.error,
    EOFError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    UnicodeDecodeError,
)


class BrokenHeader(ValueError):
    """Not the header of a GGUF file that can be read. The message goes on where a path ends;
    field: the tensor that is at fault, if one is."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file.

    shape: in torch's order, slowest dim first. type_id: the ggml type. offset: bytes from the
    first tensor's.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass
class GGUFHeader:
    """What a header says.

    data: the bytes of the whole file, mapped; num_bytes: those of the header.
    metadata: str, bool, int, float, and lists of one of them, by key. skipped: keys of lists of
    strings that were not read. tensors: by name, in file order.
    """

    data: np.memmap[Any, np.dtype[np.uint8]]
    num_bytes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)


def read_gguf_header(path: Path, *, strings: bool) -> GGUFHeader:
    """The header of the file at `path`, which is there.

    strings: read lists of strings too, a tokenizer's tokens and merges, most of a header; all
    text must then be UTF-8. Else they are skipped, and opening takes milliseconds.

    Raises BrokenHeader for what is no GGUF file, or ends or breaks inside its header.
    """
    if not path.stat().st_size:
        raise BrokenHeader("is not a GGUF file: it is empty")
    header = GGUFHeader(np.memmap(path, dtype=np.uint8, mode="r"))
    magic = bytes(header.data[:4])
    if magic != b"GGUF":
        raise BrokenHeader(f"is not a GGUF file: it begins {magic!r}")
    try:
        _read(header, _Cursor(header.data.data, len(magic), strings))
    except _BROKEN as error:
        why = f"ends or breaks inside its GGUF header ({error}); fetch it again"
        raise BrokenHeader(why) from error
    return header


def _read(header: GGUFHeader, cursor: _Cursor) -> None:
    version = cursor.number("<I")
    if version not in _VERSIONS:
        raise BrokenHeader(f"is GGUF version {version}; 2 and 3 are read, in little-endian")
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    for _ in range(num_keys):
        key = cursor.string()
        value = cursor.value(cursor.number("<I"))
        if value is None:
            header.skipped.append(key)
        else:
            header.metadata[key] = value
    for _ in range(num_tensors):
        tensor = _read_tensor(cursor)
        header.tensors[tensor.name] = tensor
    header.num_bytes = cursor.position


def _read_tensor(cursor: _Cursor) -> GGUFTensor:
    name = cursor.string()
    dims = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
    if not dims or not all(dims):
        raise BrokenHeader(f"has tensor {name} of shape {dims}", field=name)
    return GGUFTensor(name, tuple(reversed(dims)), cursor.number("<I"), cursor.number("<Q"))


class _Cursor:
    """A position in the bytes of a header."""

    def __init__(self, data: memoryview, position: int, strings: bool) -> None:
        self.data = data
        self.position = position
        self._strings = strings
        self._errors = "strict" if strings else "replace"

    def number(self, code: str) -> int:
        value = struct.unpack_from(code, self.data, self.position)[0]
        self.position += struct.calcsize(code)
        return int(value)

    def take(self, num_bytes: int) -> memoryview:
        start, end = self.position, self.position + num_bytes
        if end > len(self.data):
            raise EOFError(f"{num_bytes} bytes are cut")
        self.position = end
        return self.data[start:end]

    def string(self) -> str:
        return bytes(self.take(self.number("<Q"))).decode("utf-8", errors=self._errors)

    def skip_strings(self, count: int) -> None:
        unpack, data, position = struct.Struct("<Q").unpack_from, self.data, self.position
        for _ in range(count):
            position += 8 + unpack(data, position)[0]
        self.position = position

    def scalars(self, type_id: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[type_id])
        values: list[Any] = np.frombuffer(self.take(dtype.itemsize * count), dtype=dtype).tolist()
        return values

    def value(self, type_id: int) -> Any:
        """One metadata value; None for a list of strings that is skipped."""
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalars(type_id, 1)[0]
        element, count = self.number("<I"), self.number("<Q")
        if element == _STRING and not self._strings:
            return self.skip_strings(count)
        if element in (_STRING, _ARRAY):
            return [self.value(element) for _ in range(count)]
        return self.scalars(element, count)
