"""Which files hold the weights at a path: transformers' order of preference.

`model.safetensors`, then what `model.safetensors.index.json` names, then one variant of either,
then every other *.safetensors file. Files that lie beside the weights (an optimizer's state, an
adapter, Mistral's own format) count only where there is nothing else. After `transformers`
modeling_utils.py::_get_resolved_checkpoint_files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.errors import CheckpointError, ModelNotFound

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_VARIANT = re.compile(r"model\.[^.]+\.safetensors")
_VARIANT_INDEX = re.compile(r"model\.safetensors\.index\.[^.]+\.json")
_INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_BESIDE = ("consolidated", "adapter", "optimizer", "scheduler", "training_", "rng_state")
_UNFINISHED = frozenset(
    {"tmp", "temp", "incomplete", "part", "partial", "download", "crdownload", "writing"}
)
_LARGEST_JSON_BYTES = 256 << 20
_SHOWN = 200


@dataclass(frozen=True)
class WeightFiles:
    """files: sorted. shard_of: the file of every tensor, where an index says so."""

    files: list[Path]
    index: Path | None = None
    shard_of: Mapping[str, Path] = field(default_factory=dict)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def weight_files(path: Path) -> WeightFiles:
    """The files that hold the weights at `path`: a folder, a safetensors file, or an index.

    Raises ModelNotFound when nothing is there, CheckpointError, naming the file, for what cannot
    be read, is no regular file, or is missing though an index or its own name asks for it.
    """
    if not is_folder(path):
        require_file(path)
        return _indexed(path) if path.suffix == ".json" else WeightFiles([path])
    names = _names(path)
    for single in (SINGLE_NAME, INDEX_NAME):
        if single in names:
            return weight_files(path / single)
    for pattern in (_VARIANT, _VARIANT_INDEX, _INDEX):
        matches = [name for name in names if pattern.fullmatch(name) and not _is_beside(name)]
        if len(matches) > 1:
            raise CheckpointError(
                f"{shown(path)} has several models, name one: {', '.join(matches)}", field="path"
            )
        if matches:
            return weight_files(path / matches[0])
    return WeightFiles(_unindexed(path, names))


def unfinished(folder: Path) -> Path | None:
    """A file by which a folder shows that it is still being written."""
    if not is_folder(folder):
        return None
    for name in sorted(_listed(folder)):
        if _is_unfinished(name.lower()):
            return folder / name
    return None


def _is_unfinished(name: str) -> bool:
    stem, dot, ending = name.partition(".safetensors.")
    # As rsync writes: .model.safetensors.k3Fq9Z, and later renames.
    if dot and stem.startswith("."):
        return True
    # model.safetensors.tmp.4711, shard.tmp
    return bool(_UNFINISHED.intersection((ending if dot else name.rpartition(".")[2]).split(".")))


def exists(path: Path) -> bool:
    """Whether anything is at `path`. Raises CheckpointError where nobody may look."""
    try:
        _stat(path)
    except ModelNotFound:
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether a folder is at `path`. Raises ModelNotFound or CheckpointError, naming it."""
    return stat.S_ISDIR(_stat(path).st_mode)


def require_file(path: Path) -> int:
    """The size in bytes of the regular file at `path`.

    Raises ModelNotFound when nothing is there and CheckpointError for anything else: a pipe or
    a device could be read for ever.
    """
    found = _stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{shown(path)} is no regular file", field="path")
    return found.st_size


def read_small(path: Path) -> bytes:
    """The contents of a JSON file. Raises as `require_file` does, and for an absurd size."""
    size = require_file(path)
    if size > _LARGEST_JSON_BYTES:
        raise CheckpointError(f"{shown(path)} has {size} bytes: too many for JSON", field="path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that the system does not let us read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(f"{shown(path)} cannot be read: {reason}", field="path")


def shown(path: Path) -> str:
    """A path as messages have it: one of thousands of characters is cut."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(
            f"no safetensors file or folder at {shown(path)}", field="path"
        ) from None
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the name.
        raise unreadable(path, error) from error


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise unreadable(folder, error) from error


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted, without hidden ones."""
    return sorted(name for name in _listed(folder) if not name.startswith("."))


def _is_beside(name: str) -> bool:
    return name.lower().startswith(_BESIDE)


def _unindexed(folder: Path, names: Iterable[str]) -> list[Path]:
    found = [name for name in names if name.endswith(".safetensors")]
    chosen = [name for name in found if not _is_beside(name)] or found
    if not chosen:
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        hint = f"; {others[0]} is not read, convert it to safetensors" if others else ""
        raise ModelNotFound(f"no *.safetensors file in {shown(folder)}{hint}", field="path")
    _require_shards(folder, chosen)
    for name in chosen:
        require_file(folder / name)
    return [folder / name for name in chosen]


def _require_shards(folder: Path, names: Iterable[str]) -> None:
    """Files that are called 'x-00002-of-00003' say how many there are."""
    present = set(names)
    for name in sorted(present):
        shard = _SHARD.fullmatch(name)
        if shard is None:
            continue
        stem, number, count = shard.groups()
        first = 0 if f"{stem}-{0:0{len(number)}}-of-{count}.safetensors" in present else 1
        for index in range(first, int(count) + first):
            wanted = f"{stem}-{index:0{len(number)}}-of-{count}.safetensors"
            if wanted not in present:
                raise CheckpointError(
                    f"{shown(folder / name)} is one of {int(count)} files, of which {wanted} is "
                    "missing",
                    field="path",
                )


def _indexed(index: Path) -> WeightFiles:
    try:
        listed = msgspec.json.decode(read_small(index), type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{shown(index)} is no index of safetensors: {error}", field="path"
        ) from None
    shards: dict[str, Path] = {}
    for name in sorted(set(listed.values())):
        inside = Path(name)
        if not name or inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(
                f"{shown(index)} names {name[:_SHOWN]!r}, which is not in its folder", field="path"
            )
        shards[name] = index.parent / inside
        _require_shard(index, shards[name])
    if not shards:
        raise CheckpointError(f"{shown(index)} names no file", field="path")
    return WeightFiles(
        sorted(shards.values()), index, {name: shards[file] for name, file in listed.items()}
    )


def _require_shard(index: Path, shard: Path) -> None:
    try:
        require_file(shard)
    except ModelNotFound:
        raise CheckpointError(
            f"{shown(index)} names {shard.name}, which is missing", field="path"
        ) from None
