"""From a reply and its problem to a program and what it has to pass."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from recipes.types import Problem

COLUMN = "tests"
FORMS = (
    'a list of assert statements, a list of {"stdin": text, "stdout": text}, '
    'or {"inputs": [text], "outputs": [text]}'
)
SHOWN_CHARS = 60
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A program and its tests. asserts: statements that must hold after it. pairs: what it reads,
    each in a run of its own, and what it must print."""

    code: str
    asserts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()


def extract_code(reply: str) -> str:
    """The last fenced block of a reply, which the end of the reply may close; without one, all."""
    blocks: list[str] = FENCED.findall(reply)
    return blocks[-1] if blocks else reply


def column_tests(reply: str, problem: Problem) -> Tested:
    """The code of a reply with the problem's column `tests`, or its JSON.

    Raises InvalidRequest (`reward`) for a problem without tests that can be read.
    """
    found = problem.columns.get(COLUMN)
    if isinstance(found, str):
        found = _decoded(found)
    code = extract_code(reply)
    if isinstance(found, Mapping):
        found = _columns_as_pairs(found, problem)
    if not isinstance(found, Sequence) or isinstance(found, bytes) or not len(found):
        raise _unreadable(problem)
    if all(isinstance(test, str) for test in found):
        return Tested(code=code, asserts=tuple(found))
    return Tested(code=code, pairs=tuple(_pair(test, problem) for test in found))


def _decoded(text: str) -> Any:
    """What a table keeps as text: JSON, or one block of asserts."""
    if text.lstrip().startswith(("[", "{")):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass
    return [text] if text.strip() else []


def _columns_as_pairs(found: Mapping[str, Any], problem: Problem) -> list[dict[str, Any]]:
    inputs, outputs = found.get("inputs"), found.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise _unreadable(problem)
    return [{"stdin": i, "stdout": o} for i, o in zip(inputs, outputs, strict=True)]


def _pair(test: Any, problem: Problem) -> tuple[str, str]:
    if isinstance(test, Mapping):
        read, printed = test.get("stdin"), test.get("stdout")
        if isinstance(read, str) and isinstance(printed, str):
            return read, printed
    raise _unreadable(problem)


def _unreadable(problem: Problem) -> InvalidRequest:
    shown = problem.question[:SHOWN_CHARS]
    return InvalidRequest(
        f"reward: the problem {shown!r} has no column {COLUMN} that --reward code can read; give "
        f"it {FORMS}",
        field="reward",
    )
