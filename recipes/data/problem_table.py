"""The problems of a data set, packed: a row costs the bytes of its text and some 60 more.

A million rows of 1 KB take about a gigabyte, in each process of a run; as Python objects they
would take three to ten times that. A problem is unpacked when it is drawn.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from engine.errors import InvalidRequest
from recipes.data.chats import key_of, prompt_chat
from recipes.data.column_map import ColumnMap, lookup
from recipes.data.rows import Place, Row, Unit, at
from recipes.data.source import Source
from recipes.environments.base import key_digest
from recipes.types import Problem


class ProblemTable:
    """Problems by index, each with the place of its row."""

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._digests = array("Q")
        self._numbers = array("q")
        self._files: list[tuple[Path, Unit]] = []
        self._file_of = array("l")

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, problem: Problem, place: Place) -> None:
        """Append a problem. Raises TypeError or ValueError for a column that JSON cannot hold."""
        parts = [problem.question, problem.answer, problem.chat, problem.columns]
        packed = json.dumps(parts, ensure_ascii=False, default=msgspec.to_builtins).encode()
        if not self._files or self._files[-1] != (place.path, place.unit):
            self._files.append((place.path, place.unit))
        self._packed.append(packed)
        self._digests.append(key_digest(problem.key))
        self._numbers.append(place.number)
        self._file_of.append(len(self._files) - 1)

    def problem(self, index: int) -> Problem:
        """The problem, new objects at each call. Dates and decimals in columns are text, bytes are
        base64."""
        question, answer, chat, columns = json.loads(self._packed[index])
        key = key_of(tuple(chat)) if chat else question
        return Problem(question=question, answer=answer, key=key, chat=tuple(chat), columns=columns)

    def place(self, index: int) -> Place:
        """Where the problem's row stands."""
        path, unit = self._files[self._file_of[index]]
        return Place(path, self._numbers[index], unit)

    def digest(self, index: int) -> int:
        """`key_digest` of the problem's key."""
        return self._digests[index]


class Layout(Protocol):
    """What a row of a data set says, once its first row is known."""

    def problem(self, row: Row, *, field: str) -> Problem:
        """The row as a problem. Raises InvalidRequest naming `field` and the row."""
        ...


FindLayout = Callable[[Row, str], Layout]
"""The layout of a data set by its first row and the option that names the data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLayout:
    """Rows of a prompt and an answer; a `Layout`."""

    columns: ColumnMap

    def problem(self, row: Row, *, field: str) -> Problem:
        """See `Layout`."""
        value: Any = lookup(row, self.columns.prompt, "prompt", field=field)
        chat = prompt_chat(value, row, field=field)
        is_text = key_of(chat) == chat[-1]["content"]
        return Problem(
            question=str(chat[-1]["content"]),
            answer=self.columns.answer_of(row, field=field),
            key=key_of(chat),
            chat=() if is_text else chat,
            columns=self.columns.others(row),
        )


def read_problems(source: Source, split: str, find: FindLayout, *, field: str) -> ProblemTable:
    """The problems of a split of a data set, every row checked.

    Raises InvalidRequest naming `field` and the first row that is no problem of the layout, and
    for a split without rows."""
    table = ProblemTable()
    layout: Layout | None = None
    for row in source.rows(split, field=field):
        if layout is None:
            layout = find(row, field)
        try:
            table.add(layout.problem(row, field=field), row.place)
        except InvalidRequest:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise at(row.place, f"a column holds what JSON cannot: {error}", field=field) from error
    if not len(table):
        raise InvalidRequest(
            f'{field}: {source.path} holds no problems; a row is such as {{"prompt": text, '
            '"answer": text or number}',
            field=field,
        )
    return table
