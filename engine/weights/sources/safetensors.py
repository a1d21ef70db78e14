"""Tensors of safetensors files: one file, a folder of them, or an indexed set of shards.

Files are read and never mapped: a file that is cut off or removed while it is read is an error
that names it, where touching a mapping of it would end the process. The format is that of
huggingface/safetensors: eight bytes of header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from engine.errors import CheckpointError
from engine.models.weight_files import (
    INDEX_NAME,
    WeightFiles,
    require_file,
    shown,
    unreadable,
    weight_files,
)

__all__ = ["INDEX_NAME", "Entry", "Listing", "open_listing", "tensors"]

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_WHOLE = ("model.", "lm_head.", "score.")
"""What the names of a whole model begin with."""
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, and where in it. offset and num_bytes count from the file's start."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _File:
    """What tells a file from another of its name, and from itself once it was written to."""

    device: int
    inode: int
    num_bytes: int
    written_ns: int

    @classmethod
    def of(cls, descriptor: int) -> _File:
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class _Described(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Listing:
    """What the headers of some files say, each looked through before a tensor is read.

    found: which file each was. One that is another by the time its tensors are read, or is written
    meanwhile, would make a mixture of two sets of weights.
    """

    path: Path
    entries: list[Entry]
    found: Mapping[Path, _File]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the CPU, in memory of its own) of every entry, file by file.

        Raises CheckpointError, naming the file, when one cannot be read as its header says, or
        was replaced or written to since.
        """
        by_file: dict[Path, list[Entry]] = {}
        for entry in self.entries:
            by_file.setdefault(entry.file, []).append(entry)
        for file, entries in by_file.items():
            try:
                with file.open("rb", buffering=0) as handle:
                    for entry in entries:
                        tensor = _read(handle, entry)
                        if _File.of(handle.fileno()) != self.found[file]:
                            raise _broken(
                                file,
                                "it was written anew meanwhile; load weights that nobody writes "
                                "any more",
                            )
                        yield entry.name, tensor
                        # Not held while the next is read.
                        del tensor
            except OSError as error:
                raise unreadable(file, error) from error

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, or the path that was asked for."""
        return next((entry.file for entry in self.entries if entry.name == name), self.path)


def open_listing(path: Path) -> Listing:
    """Look through the headers of the weights at `path`.

    Raises ModelNotFound for nothing there; CheckpointError, naming the file, for one that is
    missing, broken or cut off, and for a tensor that an index says is in a file and is not.
    """
    found = weight_files(path)
    headers = {file: _header(file) for file in found.files}
    entries = [entry for _, listed in headers.values() for entry in listed]
    _require_listed(found, entries)
    entries = _with_full_names(entries)
    return Listing(path, entries, {file: which for file, (which, _) in headers.items()})


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) pairs of every file at `path`; see `open_listing`."""
    yield from open_listing(path).tensors()


def _with_full_names(entries: list[Entry]) -> list[Entry]:
    """The entries of a decoder that was saved without what is around it, as embedding models are
    (transformers' AutoModel), by the names that it has in the whole model."""
    if all(entry.name != "embed_tokens.weight" for entry in entries):
        return entries
    return [
        entry if entry.name.startswith(_WHOLE) else replace(entry, name=f"model.{entry.name}")
        for entry in entries
    ]


def _require_listed(found: WeightFiles, entries: list[Entry]) -> None:
    there = {(entry.name, entry.file) for entry in entries}
    for name, shard in found.shard_of.items():
        if (name, shard) not in there:
            raise CheckpointError(
                f"{shown(shard)} lacks {name}, which "
                f"{found.index.name if found.index else 'the index'} says it holds",
                field="path",
            )


def _header(file: Path) -> tuple[_File, list[Entry]]:
    require_file(file)
    try:
        with file.open("rb") as handle:
            which = _File.of(handle.fileno())
            size = which.num_bytes
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LARGEST_HEADER):
                raise _broken(file, f"its {size} bytes do not hold its header")
            raw = handle.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        header = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        described = {n: msgspec.json.decode(r, type=_Described) for n, r in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(file, f"its header is none ({error})") from error
    start = _LENGTH_BYTES + length
    entries = [_entry(file, name, each, start) for name, each in described.items()]
    entries.sort(key=lambda entry: entry.offset)
    _require_whole(file, entries, start, size)
    return which, entries


def _entry(file: Path, name: str, described: _Described, start: int) -> Entry:
    dtype = _DTYPES.get(described.dtype)
    if dtype is None:
        raise _broken(file, f"{name} has dtype {described.dtype}, which is not read here")
    begin, end = described.data_offsets
    count = math.prod(described.shape) * dtype.itemsize
    if any(size < 0 for size in described.shape) or not 0 <= begin <= end or end - begin != count:
        raise _broken(file, f"{name} does not lie where its header says")
    return Entry(name, file, dtype, tuple(described.shape), start + begin, count)


def _require_whole(file: Path, entries: list[Entry], start: int, size: int) -> None:
    """As the library has it: tensors lie one behind the other and fill the file."""
    end = start
    for entry in entries:
        if entry.offset != end:
            raise _broken(file, f"{entry.name} does not lie behind the tensor before it")
        end += entry.num_bytes
    if end != size:
        what = "it is cut off or still being written" if end > size else "more follows"
        raise _broken(file, f"it has {size} bytes and its header describes {end}: {what}")


def _read(handle: FileIO, entry: Entry) -> torch.Tensor:
    memory = torch.empty(entry.num_bytes, dtype=torch.uint8)
    numbers: Any = memory.numpy()
    view = memoryview(numbers)
    handle.seek(entry.offset)
    done = 0
    while done < entry.num_bytes:
        got = handle.readinto(view[done:])
        if not got:
            raise _broken(entry.file, f"{entry.name} is cut off")
        done += got
    return memory.view(entry.dtype).view(entry.shape)


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{shown(file)} cannot be read: {why}", field="path")
