"""A published delta, applied to a checkpoint: slime's format.

The index of the folder says `delta_encoding`, `compression_format` and `checksum_format`, the
version and the one it changes. Its safetensors files hold, by tensor, compressed bytes: `xor`
of the new ones and the old, or `overwrite`: a count (u4), that many positions (u4), and the new
bytes there. Their metadata holds, by tensor, the checksum of the new bytes.

A tensor that has its new checksum already is left alone, so that a delta whose application died
between two files can be applied again.
"""

from __future__ import annotations

import importlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.errors import CheckpointError, ModelNotFound, UnsupportedOption
from rollout.files.regular_file import Look, copy, read_small, reading, writing
from rollout.files.safetensors_header import TensorSpan, read_header

INDEX = "model.safetensors.index.json"

_BLOCK = 4 << 20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class _Metadata(msgspec.Struct):
    delta_encoding: str | None = None
    compression_format: str = ""
    checksum_format: str = ""
    version: str | int = ""
    base_version: str | int = ""


class _Index(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    weight_map: dict[str, str] = {}


@dataclass(frozen=True)
class PublishedDelta:
    """What the index of a delta says. files: names, in the folder."""

    encoding: str
    checksum: str
    version: str
    base: str
    files: list[str]


@dataclass(frozen=True)
class _Change:
    """One tensor: where its compressed bytes are, the checksum of the new ones, and where it
    lies."""

    name: str
    file: Path
    packed: TensorSpan
    checksum: str
    at: TensorSpan


def read_delta(folder: Path) -> PublishedDelta | None:
    """The delta in `folder`; None for a whole checkpoint. Raises CheckpointError,
    UnsupportedOption for an encoding or a compression that is not known."""
    path = folder / INDEX
    try:
        index = msgspec.json.decode(read_small(path), type=_Index)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=INDEX) from error
    meta = index.metadata
    if meta.delta_encoding is None:
        return None
    if meta.delta_encoding not in ("xor", "overwrite"):
        raise UnsupportedOption(
            f"{path} has delta_encoding {meta.delta_encoding!r}; known are xor and overwrite",
            field="delta_encoding",
        )
    if meta.compression_format != "zstd":
        raise UnsupportedOption(
            f"{path} has compression_format {meta.compression_format!r}; known is zstd",
            field="compression_format",
        )
    files = sorted(set(index.weight_map.values()))
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, outside its folder", field=INDEX)
    return PublishedDelta(
        meta.delta_encoding, meta.checksum_format, str(meta.version), str(meta.base_version), files
    )


def apply_delta(folder: Path, local: Path, *, version: int, beside: Path, look: Look) -> None:
    """Bring the checkpoint `local` from `version` - 1 to `version`, whose delta is in `folder`.

    Every file that changes is written anew at `beside`, of the same file system, and renamed
    over the old one. look: called between tensors and blocks. Raises CheckpointError
    naming the tensor or file, ModelNotFound for a file that is not there, UnsupportedOption
    when zstandard or the package of the checksum is not installed.
    """
    delta = read_delta(folder)
    assert delta is not None, "the caller looked"
    if (_integer(delta.version), _integer(delta.base)) != (version, version - 1):
        raise CheckpointError(
            f"{folder} leads from version {delta.base} to {delta.version}, not from {version - 1} "
            f"to {version}",
            field="version",
        )
    hasher = _hasher(delta.checksum)
    decompressor = _decompressor()
    changes = _read_changes(folder, delta, _locations(local))
    for path, changed in changes.items():
        _rewrite(path, beside, changed, delta.encoding, hasher, decompressor, look)


def _locations(local: Path) -> dict[str, tuple[Path, TensorSpan]]:
    """Where every tensor of the checkpoint lies."""
    return {
        name: (path, placed)
        for path in sorted(local.glob("*.safetensors"))
        for name, placed in read_header(path).tensors.items()
    }


def _read_changes(
    folder: Path, delta: PublishedDelta, locations: dict[str, tuple[Path, TensorSpan]]
) -> dict[Path, list[_Change]]:
    """The changes by the local file that they change."""
    found: dict[Path, list[_Change]] = {}
    for file in delta.files:
        path = folder / file
        if not path.is_file():
            raise ModelNotFound(f"{path} is named in the index and is not there", field=file)
        header = read_header(path)
        for name, placed in header.tensors.items():
            checksum = header.metadata.get(name)
            if name not in locations or checksum is None:
                what = "no checksum" if name in locations else "no tensor to change"
                raise CheckpointError(f"{path}: {name} has {what}", field=name)
            where, at = locations[name]
            found.setdefault(where, []).append(_Change(name, path, placed, checksum, at))
    return found


def _rewrite(
    path: Path,
    beside: Path,
    changes: list[_Change],
    encoding: str,
    hasher: Any,
    decompressor: Any,
    look: Look,
) -> None:
    with writing(beside) as file:
        copy(path, file, look)
        for change in changes:
            look()
            file.seek(change.at.start)
            old = np.frombuffer(file.read(change.at.size), np.uint8)
            if _digest(hasher, old) == change.checksum:
                continue
            new = _changed(old, change, encoding, decompressor)
            digest = _digest(hasher, new)
            if digest != change.checksum:
                raise CheckpointError(
                    f"{change.name} of {path} has checksum {digest} after the delta, not "
                    f"{change.checksum}: pull version 0 or a whole version again",
                    field=change.name,
                )
            file.seek(change.at.start)
            file.write(new.tobytes())
    beside.replace(path)


def _changed(old: Bytes, change: _Change, encoding: str, decompressor: Any) -> Bytes:
    """The new bytes of a tensor."""
    limit = old.size if encoding == "xor" else 4 + 5 * old.size
    data = _decompressed(change, limit, decompressor)
    if encoding == "xor":
        if data.size != old.size:
            raise CheckpointError(
                f"{change.name} has {old.size} bytes, its delta {data.size}", field=change.name
            )
        return old ^ data
    count = int.from_bytes(data[:4].tobytes(), "little")
    if data.size != 4 + 5 * count:
        raise CheckpointError(f"the delta of {change.name} is cut off", field=change.name)
    positions = np.frombuffer(data[4 : 4 + 4 * count].tobytes(), "<u4")
    if count and int(positions.max()) >= old.size:
        raise CheckpointError(
            f"the delta of {change.name} writes behind its {old.size} bytes", field=change.name
        )
    new = old.copy()
    new[positions] = data[4 + 4 * count :]
    return new


def _decompressed(change: _Change, limit: int, decompressor: Any) -> Bytes:
    """At most `limit` bytes; more, or bytes that are no zstd, raise CheckpointError."""
    packed = _packed(change, limit)
    try:
        reader = decompressor.stream_reader(io.BytesIO(packed))
        blocks: list[bytes] = []
        size = 0
        while size <= limit and (block := reader.read(_BLOCK)):
            blocks.append(block)
            size += len(block)
    except Exception as error:  # the package's own error, which cannot be named without it
        raise CheckpointError(
            f"the delta of {change.name} cannot be decompressed: {error}", field=change.name
        ) from error
    if size > limit:
        raise CheckpointError(
            f"the delta of {change.name} has more than {limit} bytes", field=change.name
        )
    return np.frombuffer(b"".join(blocks), np.uint8)


def _packed(change: _Change, limit: int) -> bytes:
    """The compressed bytes. What cannot be compressed grows by less than a hundredth."""
    if change.packed.size > limit + limit // 64 + 1024:
        raise CheckpointError(
            f"the delta of {change.name} has more than {limit} bytes", field=change.name
        )
    with reading(change.file) as file:
        file.seek(change.packed.start)
        return file.read(change.packed.size)


class _Adler32:
    """adler32 as the hash objects have it."""

    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Any) -> None:
        """Add bytes."""
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        """Eight digits."""
        return f"{self._value:08x}"


def _digest(hasher: Any, data: Bytes) -> str:
    found = hasher()
    found.update(data)
    return str(found.hexdigest())


def _hasher(name: str) -> Any:
    """A function that makes a hash object."""
    if name == "adler32":
        return _Adler32
    packages = {"xxh3-128": ("xxhash", "xxh3_128"), "blake3": ("blake3", "blake3")}
    if name not in packages:
        raise UnsupportedOption(
            f"checksum_format is {name!r}; known are adler32, {', '.join(packages)}",
            field="checksum_format",
        )
    package, attribute = packages[name]
    return getattr(_package(package, "checksum_format"), attribute)


def _decompressor() -> Any:
    return _package("zstandard", "compression_format").ZstdDecompressor()


def _package(name: str, field: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedOption(
            f"the delta needs the package {name}; install slipstream with the extra 'delta', or "
            "publish whole versions",
            field=field,
        ) from error


def _integer(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
