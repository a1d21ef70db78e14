"""The header of a GGUF file (ggml-org/ggml docs/gguf.md), and its tensors where they lie.

Arrays of strings - a tokenizer's tokens and merges, most of a header - are skipped, so
opening takes milliseconds; whoever needs them reads them with the gguf library.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from engine.errors import CheckpointError

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


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file. `shape` is in torch's order, slowest dim first."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def type_name(self) -> str:
        """The ggml type ("Q4_1"), or its number where the library does not know it."""
        try:
            return gguf.GGMLQuantizationType(self.type_id).name
        except ValueError:
            return f"type {self.type_id}"


class _Cursor:
    """A position in the bytes of a header."""

    def __init__(self, data: np.memmap[Any, Any], position: int) -> None:
        self.data = data
        self.buffer = data.data
        self.position = position

    def number(self, code: str) -> int:
        value = struct.unpack_from(code, self.buffer, self.position)[0]
        self.position += struct.calcsize(code)
        return int(value)

    def take(self, num_bytes: int) -> memoryview:
        start, end = self.position, self.position + num_bytes
        if end > len(self.buffer):
            raise EOFError("the header is cut off")
        self.position = end
        return self.buffer[start:end]

    def string(self) -> str:
        return bytes(self.take(self.number("<Q"))).decode("utf-8", errors="replace")

    def skip_strings(self, count: int) -> None:
        unpack, buffer, position = struct.Struct("<Q").unpack_from, self.buffer, self.position
        for _ in range(count):
            position += 8 + unpack(buffer, position)[0]
        self.position = position

    def scalars(self, type_id: int, count: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_SCALARS[type_id])
        return np.frombuffer(self.take(dtype.itemsize * count), dtype=dtype)

    def value(self, type_id: int) -> Any:
        """One metadata value; None for an array of strings."""
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalars(type_id, 1)[0].item()
        element, count = self.number("<I"), self.number("<Q")
        if element == _STRING:
            self.skip_strings(count)
            return None
        if element == _ARRAY:
            return [self.value(_ARRAY) for _ in range(count)]
        return self.scalars(element, count).tolist()


class GGUFFile:
    """An open GGUF file.

    metadata: scalars and numeric arrays by key. string_lists: keys of arrays of strings.
    tensors: by their names in the file, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Read the header. Raises CheckpointError when `path` is not a whole GGUF file."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.string_lists: list[str] = []
        self.tensors: dict[str, GGUFTensor] = {}
        if path.stat().st_size < 24:
            raise CheckpointError(f"{path} is not a GGUF file: it is too short", field="path")
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        try:
            self._data_start = self._read_header()
        except (struct.error, EOFError, KeyError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path} has a broken GGUF header: {error}", field="path"
            ) from None

    def _read_header(self) -> int:
        cursor = _Cursor(self._data, 0)
        magic, version = bytes(cursor.take(4)), cursor.number("<I")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path} is not a GGUF file of version 2 or 3 (little-endian)", field="path"
            )
        num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(num_keys):
            key = cursor.string()
            value = cursor.value(cursor.number("<I"))
            if value is None:
                self.string_lists.append(key)
            else:
                self.metadata[key] = value
        for _ in range(num_tensors):
            tensor = self._read_tensor(cursor)
            self.tensors[tensor.name] = tensor
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}, not a power of two",
                field="general.alignment",
            )
        return -(-cursor.position // alignment) * alignment

    def _read_tensor(self, cursor: _Cursor) -> GGUFTensor:
        name = cursor.string()
        dims = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
        if not dims or not all(dims):
            raise CheckpointError(f"{self.path}: {name} has shape {dims}", field=name)
        return GGUFTensor(name, tuple(reversed(dims)), cursor.number("<I"), cursor.number("<Q"))

    def dequantize(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor's values, float32, in its torch shape; memory of its own.

        Raises CheckpointError, naming the tensor, for a type the gguf library cannot
        dequantise and for bytes that lie past the end of the file.
        """
        tensor = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            values = gguf.quants.dequantize(self._bytes_of(tensor, kind), kind)
            # An F32 tensor comes back as a view of the read-only file.
            owned = values if values.flags.writeable else values.copy()
            return owned.astype(np.float32, copy=False).reshape(tensor.shape)
        except (ValueError, NotImplementedError):
            raise CheckpointError(
                f"{self.path}: {name} has {tensor.type_name}, which cannot be dequantised",
                field=name,
            ) from None

    def _bytes_of(self, tensor: GGUFTensor, kind: Any) -> np.ndarray[Any, Any]:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = tensor.shape[-1] // block_size * block_bytes
        rows = math.prod(tensor.shape[:-1])
        start = self._data_start + tensor.offset
        end = start + rows * row_bytes
        if end > len(self._data):
            raise CheckpointError(
                f"{self.path} is cut off: {tensor.name} ends at byte {end} of {len(self._data)}",
                field=tensor.name,
            )
        return np.asarray(self._data[start:end]).reshape(rows, row_bytes)
