"""Where a data set lies: one file, or a folder of files that may be parted into splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from engine.errors import InvalidRequest
from recipes.data.arrow_rows import arrow_rows, parquet_rows
from recipes.data.csv_rows import csv_rows
from recipes.data.folders import find_splits
from recipes.data.json_rows import json_rows
from recipes.data.rows import Row

DEFAULT_SPLIT = "train"


class Reader(Protocol):
    """Reads the rows of one file; errors name `field`."""

    def __call__(self, path: Path, *, field: str) -> Iterator[Row]:
        """The rows in order."""
        ...


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        ".jsonl": json_rows,
        ".jsonl.gz": json_rows,
        ".ndjson": json_rows,
        ".json": json_rows,
        ".csv": csv_rows,
        ".csv.gz": csv_rows,
        ".tsv": csv_rows,
        ".tsv.gz": csv_rows,
        ".parquet": parquet_rows,
        ".arrow": arrow_rows,
        ".feather": arrow_rows,
    }
)
"""The reader of a file by the end of its name. A `.json` file has an object a line too."""

FORMATS = "jsonl, csv, tsv (plain or .gz), parquet, arrow, or a folder of them"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of a data set by split; one without splits has all of them under ""."""

    path: Path
    splits: Mapping[str, tuple[Path, ...]]

    @property
    def name(self) -> str:
        """The data set's name: that of its file or folder."""
        name = self.path.resolve().name
        suffix = suffix_of(self.path)
        return name[: -len(suffix)] if suffix and len(suffix) < len(name) else name

    @property
    def is_split(self) -> bool:
        """Whether its files have splits with names."""
        return set(self.splits) != {""}

    def rows(self, split: str, *, field: str) -> Iterator[Row]:
        """The rows of a split of `splits`, file after file. Raises InvalidRequest naming `field`
        and the place where a file cannot be read."""
        for path in self.splits[split]:
            yield from READERS[suffix_of(path)](path, field=field)


def suffix_of(path: Path) -> str:
    """The end of a file's name by which it has a reader; "" if it has none."""
    name = path.name.lower()
    return next((s for s in sorted(READERS, key=len, reverse=True) if name.endswith(s)), "")


def open_source(path: Path, *, field: str) -> Source:
    """The data set at `path`; no row is read. Raises InvalidRequest naming `field` if nothing is
    there, or nothing that can be read."""
    if path.is_dir():
        return Source(path=path, splits=find_splits(path, _is_data, field=field))
    if not path.exists():
        raise InvalidRequest(f"{field}: no file at {path}", field=field)
    if not suffix_of(path):
        raise InvalidRequest(
            f"{field}: {path} is of no known format; there are {FORMATS}", field=field
        )
    return Source(path=path, splits={"": (path,)})


def choose_split(source: Source, wanted: str | None, *, field: str, flag: str) -> str:
    """The split of that name; without one, the only split, or "train".

    Raises InvalidRequest naming `flag`'s option and listing the splits there are."""
    if wanted is None:
        only = next(iter(source.splits)) if len(source.splits) == 1 else DEFAULT_SPLIT
        if only in source.splits:
            return only
        raise InvalidRequest(
            f"{field}: {source.path} has the splits {', '.join(source.splits)}; name one with "
            f"--{flag.replace('_', '-')}",
            field=field,
        )
    if wanted in source.splits and source.is_split:
        return wanted
    there = f"has {', '.join(source.splits)}" if source.is_split else "has no splits with names"
    raise InvalidRequest(f"{flag}: no split {wanted!r}: {source.path} {there}", field=flag)


def _is_data(path: Path) -> bool:
    """Whether a file in a folder holds rows; `.json` files there describe the others."""
    return suffix_of(path) not in ("", ".json")
