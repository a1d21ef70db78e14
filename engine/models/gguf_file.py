"""A GGUF file: what its header says, and its tensors where they lie."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from engine.errors import CheckpointError
from engine.protocol.gguf_header import BrokenHeader, GGUFTensor, read_gguf_header


class GGUFFile:
    """An open GGUF file.

    metadata: scalars and numeric arrays by key. string_lists: keys of arrays of strings.
    tensors: by their names in the file, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Read the header. Raises CheckpointError when `path` is not a whole GGUF file."""
        self.path = path
        try:
            header = read_gguf_header(path, strings=False)
        except BrokenHeader as error:
            raise CheckpointError(f"{path} {error}", field=error.field or "path") from None
        self._data = header.data
        self.metadata = header.metadata
        self.string_lists = header.skipped
        self.tensors = header.tensors
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}, not a power of two",
                field="general.alignment",
            )
        self._data_start = -(-header.num_bytes // alignment) * alignment

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
                f"{self.path}: {name} has {_type_name(tensor)}, which cannot be dequantised",
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


def _type_name(tensor: GGUFTensor) -> str:
    """The ggml type ("Q4_1"), or its number where the library does not know it."""
    try:
        return gguf.GGMLQuantizationType(tensor.type_id).name
    except ValueError:
        return f"type {tensor.type_id}"
