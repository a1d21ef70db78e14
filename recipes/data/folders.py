"""The splits of a folder: as `datasets` saves them, or files whose names say them.

`Dataset.save_to_disk` writes `state.json` beside Arrow files; `DatasetDict.save_to_disk` writes
`dataset_dict.json` beside one such folder a split. What is downloaded from a hub is a folder of
files such as `data/train-00000-of-00002.parquet`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from recipes.data.rows import at

Splits = Mapping[str, tuple[Path, ...]]
IsData = Callable[[Path], bool]

STATE = "state.json"
DICT = "dataset_dict.json"

_WORDS = "train|validation|valid|val|dev|test|eval"
_SPLIT = re.compile(rf"(?:^|[-._ /])({_WORDS})(?=$|[-._ /0-9])", re.IGNORECASE)


class _File(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    """`state.json`. The indices are those of rows chosen without copying; they were files once."""

    data_files: list[_File] = msgspec.field(name="_data_files")
    indices: list[_File] | None = msgspec.field(name="_indices_data_files", default=None)


class _Dict(msgspec.Struct):
    """`dataset_dict.json`."""

    splits: list[str]


def find_splits(folder: Path, is_data: IsData, *, field: str) -> Splits:
    """Files by split, in order; all under "" where there are no splits. is_data: whether a file
    holds rows.

    Raises InvalidRequest naming `field` for a folder without data, one of several data sets, and
    one whose files are in a split only in part.
    """
    if (folder / DICT).is_file():
        names = _read(folder / DICT, _Dict, field).splits
        if not names:
            raise at(folder / DICT, "names no split; save the data set again", field=field)
        return {name: _saved_files(folder / name, field) for name in names}
    if (folder / STATE).is_file():
        return {"": _saved_files(folder, field)}
    files = _data_files(folder, is_data)
    if not files:
        raise InvalidRequest(f"{field}: {_without_data(folder, is_data)}", field=field)
    return _by_name(folder, files, field)


def _saved_files(folder: Path, field: str) -> tuple[Path, ...]:
    state = _read(folder / STATE, _State, field)
    if state.indices:
        raise at(
            folder,
            "keeps its rows by a list of indices; load it with datasets, and save "
            "flatten_indices() of it",
            field=field,
        )
    names = [file.filename for file in state.data_files]
    for name in names:
        if Path(name).name != name or not name.endswith(".arrow"):
            told = f"names {name!r}, which is no Arrow file of its folder; save the data set again"
            raise at(folder / STATE, told, field=field)
    return tuple(folder / name for name in names)


def _read(path: Path, kind: type[Any], field: str) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise at(path, f"cannot be read: {error}; save the data set again", field=field) from error


def _data_files(folder: Path, is_data: IsData) -> list[Path]:
    """The folder's own files, those of its `data` folder, and those of folders named as splits."""
    inner = [path for path in folder.iterdir() if path.is_dir()]
    rooms = [p for p in inner if p.name == "data" or _SPLIT.fullmatch(p.name)]
    found = [path for room in (folder, *rooms) for path in room.iterdir() if path.is_file()]
    return sorted(p for p in found if is_data(p) and not p.name.startswith((".", "cache-")))


def _by_name(folder: Path, files: list[Path], field: str) -> Splits:
    splits: dict[str, tuple[Path, ...]] = {}
    for path in files:
        found = _SPLIT.findall(path.relative_to(folder).as_posix())
        name = found[-1].lower() if found else ""
        splits[name] = (*splits.get(name, ()), path)
    if "" in splits and len(splits) > 1:
        raise at(
            folder,
            f"{splits[''][0].name} has the name of no split, and others have "
            f"({', '.join(sorted(splits.keys() - {''}))}); give one file, or name them all",
            field=field,
        )
    return splits


def _without_data(folder: Path, is_data: IsData) -> str:
    rooms = sorted(p.name for p in folder.iterdir() if p.is_dir() and _holds_data(p, is_data))
    if rooms:
        return f"{folder} has data sets in its folders {', '.join(rooms)}; give one of them"
    return f"{folder} holds no data: no jsonl, csv, parquet or arrow files, nor {STATE}"


def _holds_data(folder: Path, is_data: IsData) -> bool:
    saved = (folder / STATE).is_file() or (folder / DICT).is_file()
    return saved or bool(_data_files(folder, is_data))
