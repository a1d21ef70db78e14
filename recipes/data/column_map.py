"""Which column of a row is the prompt, which the answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from recipes.data.data_options import DataOptions
from recipes.data.rows import Row, at

PROMPT_NAMES = ("prompt", "question", "problem", "messages")
ANSWER_NAMES = ("answer", "solution", "ground_truth")
SHOWN_COLUMNS = 20


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """The columns of a data set, e.g. ColumnMap(prompt="question", answer="answer").

    answer: None where there is none. pattern: finds the answer in its column. needs_answer: whether
    a row without a text or number there is an error.
    """

    prompt: str
    answer: str | None
    pattern: re.Pattern[str] | None = None
    needs_answer: bool = True

    def answer_of(self, row: Row, *, field: str) -> str:
        """The answer's text. Raises InvalidRequest naming `field` and the row for one that is
        missing, of another type, empty, or without the pattern; "" where none is needed."""
        value = None if self.answer is None else lookup(row, self.answer, "answer", field=field)
        if not self.needs_answer and not _is_scalar(value):
            return ""
        if not _is_scalar(value):
            raise at(
                row.place, f"the answer must be text or a number, not {kind_of(value)}", field=field
            )
        text = str(value)
        if self.pattern is not None:
            text = self._matched(text, row, field)
        if not text.strip() and self.needs_answer:
            raise at(row.place, "the answer is empty; write it, or leave the row out", field=field)
        return text

    def others(self, row: Row) -> dict[str, Any]:
        """The columns that the problem's prompt and answer do not say already."""
        said = {self.prompt}
        if self.answer is not None and self.pattern is None:
            said |= {self.answer} if _is_scalar(row.columns.get(self.answer)) else set()
        return {name: value for name, value in row.columns.items() if name not in said}

    def _matched(self, text: str, row: Row, field: str) -> str:
        assert self.pattern is not None
        found = list(self.pattern.finditer(text))
        if found:
            last = found[-1]
            return (last[1] or "") if self.pattern.groups else last[0]
        if not self.needs_answer:
            return ""
        raise at(
            row.place,
            f"the answer has nothing that matches --answer-pattern {self.pattern.pattern!r}: "
            f"{text[-80:]!r}",
            field=field,
        )


def map_columns(row: Row, options: DataOptions, *, needs_answer: bool, field: str) -> ColumnMap:
    """The map of a data set by its options and its first row.

    Raises InvalidRequest, listing the columns there are, where an option names none of them, or
    is not given and not exactly one of the usual names is there."""
    prompt = options.prompt_column or usual_column(row, PROMPT_NAMES, "prompt", field=field)
    answer = options.answer_column or _usual_answer(row, needs_answer, field)
    lookup(row, prompt, "prompt", field=field)
    if answer is not None:
        lookup(row, answer, "answer", field=field)
    return ColumnMap(
        prompt=prompt,
        answer=answer,
        pattern=compiled(options.answer_pattern),
        needs_answer=needs_answer,
    )


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The expression of --answer-pattern. Raises InvalidRequest (`answer_pattern`)."""
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InvalidRequest(
            f"answer_pattern: {pattern!r} is no regular expression: {error}", field="answer_pattern"
        ) from error


def lookup(row: Row, name: str, what: str, *, field: str) -> Any:
    """The value of a column; a dot leads into an object. what: "prompt" or "answer".

    Raises InvalidRequest naming `field` and the row, and listing the columns it has."""
    if name in row.columns:
        return row.columns[name]
    value: Any = row.columns
    path: list[str] = []
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            there = _listed(value) if isinstance(value, dict) else kind_of(value)
            inside = f"{'.'.join(path)} is" if path else "it has"
            raise at(
                row.place,
                f"no column {name!r} for the {what}; {inside} {there}; name another with "
                f"--{what}-column",
                field=field,
            )
        path.append(part)
        value = value[part]
    return value


def kind_of(value: Any) -> str:
    """What JSON calls a value, for messages."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and math.isinf(value):
        return "an infinite one"
    names = {str: "text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _usual_answer(row: Row, needs_answer: bool, field: str) -> str | None:
    if not needs_answer and not any(name in row.columns for name in ANSWER_NAMES):
        return None
    return usual_column(row, ANSWER_NAMES, "answer", field=field)


def usual_column(row: Row, names: Sequence[str], what: str, *, field: str) -> str:
    """The one of some names that is a column. Raises InvalidRequest naming `field` and the row, and
    listing the columns it has, if none is or several are."""
    found = [name for name in names if name in row.columns]
    if len(found) == 1:
        return found[0]
    several = f"{', '.join(found)} may each be" if found else f"none of {', '.join(names)} is there"
    told = f"{several} the {what}" if found else f"no column for the {what}: {several}"
    raise at(
        row.place,
        f"{told}; it has {_listed(row.columns)}; name one with --{what}-column",
        field=field,
    )


def _is_scalar(value: Any) -> bool:
    """Whether a value is a text or a finite number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _listed(columns: dict[str, Any]) -> str:
    names = [name or "''" for name in columns]
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return f"{', '.join(names[:SHOWN_COLUMNS]) or 'no columns'}{more}"
