"""The header of a safetensors file, without its tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.errors import CheckpointError
from rollout.files.regular_file import reading

_LENGTH_BYTES = 8
_MAX_HEADER = 1 << 28


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class TensorSpan:
    """Bytes of one tensor: where they start in the file, and how many there are."""

    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """Where the tensors lie, and the free text beside them."""

    tensors: dict[str, TensorSpan]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is no safetensors file, or is cut off."""
    try:
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > min(size, _MAX_HEADER):
                raise CheckpointError(f"{path} has {size} bytes and is cut off", field=path.name)
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        metadata = raw.pop("__metadata__", None)
        texts: dict[str, str] = {}
        if metadata is not None:
            texts = msgspec.json.decode(metadata, type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or is cut off: {error}", field=path.name
        ) from error
    start = _LENGTH_BYTES + length
    tensors: dict[str, TensorSpan] = {}
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= size - start:
            raise CheckpointError(f"{path} is cut off before the end of {name}", field=path.name)
        tensors[name] = TensorSpan(start + begin, end - begin)
    return Header(tensors, texts)
