"""Rows of Parquet and Arrow files, through pyarrow: the extra `data`.

The Arrow files are those of `datasets.Dataset.save_to_disk` (a stream of record batches) and of
Feather (the same with an index). https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from recipes.data.rows import Place, Row, at

BATCH_ROWS = 1024
"""Rows that are Python objects at once."""

_FILE_MAGIC = b"ARROW1"


def parquet_rows(path: Path, *, field: str) -> Iterator[Row]:
    """The rows of a Parquet file, in order, a batch of them in memory at once.

    Raises InvalidRequest naming `field` and file for one that is cut off or broken, with the row
    where it is one, and if pyarrow is missing.
    """
    _require_pyarrow(path, field)
    from pyarrow import parquet

    with _readable(path, field), parquet.ParquetFile(path, memory_map=True) as file:
        _check_names(path, file.schema_arrow.names, field)
        yield from _rows(path, file.iter_batches(batch_size=BATCH_ROWS), field)


def arrow_rows(path: Path, *, field: str) -> Iterator[Row]:
    """As `parquet_rows`, of an Arrow file of either kind."""
    _require_pyarrow(path, field)
    import pyarrow

    with _readable(path, field), pyarrow.memory_map(str(path)) as mapped:
        has_index = mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        mapped.seek(0)
        if has_index:
            reader = pyarrow.ipc.open_file(mapped)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = reader = pyarrow.ipc.open_stream(mapped)
        _check_names(path, reader.schema.names, field)
        yield from _rows(path, batches, field)


def _require_pyarrow(path: Path, field: str) -> None:
    try:
        import pyarrow.ipc
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            f"{field}: {path} needs the pyarrow package: pip install -e '.[data]'", field=field
        ) from error
    if not path.is_file():
        raise InvalidRequest(f"{field}: no file at {path}", field=field)


@contextmanager
def _readable(path: Path, field: str) -> Iterator[None]:
    """Errors of the library and of the disk as ours."""
    from pyarrow import ArrowException

    try:
        yield
    except InvalidRequest:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise at(
            path, f"cannot be read: {_first_line(error)}; write it again", field=field
        ) from error


def _check_names(path: Path, names: list[str], field: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise at(path, f"has the column {twice[0]!r} twice; rename one", field=field)


def _rows(path: Path, batches: Iterable[Any], field: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for offset in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(offset, BATCH_ROWS)
            for columns in _plain(path, part, number, field):
                number += 1
                yield Row(place=Place(path, number, "row"), columns=columns)


def _plain(path: Path, batch: Any, before: int, field: str) -> list[dict[str, Any]]:
    """The batch as Python objects. It is validated first, since the library trusts what a broken
    file says of lengths; what is wrong, such as text that is no UTF-8, has a row."""
    try:
        batch.validate(full=True)
        rows: list[dict[str, Any]] = _to_microseconds(batch).to_pylist()
        return rows
    except ValueError:
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).validate(full=True)
            except ValueError as error:
                place = Place(path, before + index + 1, "row")
                raise at(place, f"cannot be read: {_first_line(error)}", field=field) from error
        raise


def _to_microseconds(batch: Any) -> Any:
    """The batch with its times as exact as Python's, which know no nanoseconds."""
    import pyarrow

    us: dict[Any, Any] = {
        pyarrow.time64("ns"): pyarrow.time64("us"),
        pyarrow.duration("ns"): pyarrow.duration("us"),
    }
    for index, column in enumerate(batch.schema):
        kind = column.type
        rounded = us.get(kind)
        if pyarrow.types.is_timestamp(kind) and kind.unit == "ns":
            rounded = pyarrow.timestamp("us", kind.tz)
        if rounded is not None:
            values = batch.column(index).cast(rounded, safe=False)
            batch = batch.set_column(index, column.name, values)
    return batch


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
