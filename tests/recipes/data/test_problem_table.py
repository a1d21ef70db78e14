"""Problems packed row by row come back as they were."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.data.column_map import map_columns
from recipes.data.data_options import DataOptions
from recipes.data.problem_table import ProblemTable, PromptLayout, read_problems
from recipes.data.rows import Place, Row
from recipes.data.source import open_source
from recipes.environments.base import key_digest
from recipes.types import Problem

PLACE = Place(Path("t"), 5, "row")


def find(row: Row, field: str, *, needs_answer: bool = True) -> PromptLayout:
    columns = map_columns(row, DataOptions(), needs_answer=needs_answer, field=field)
    return PromptLayout(columns=columns)


def find_without_answer(row: Row, field: str) -> PromptLayout:
    return find(row, field, needs_answer=False)


def test_a_problem_comes_back_as_it_was() -> None:
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "zwölf"})
    key = json.dumps(chat, ensure_ascii=False, sort_keys=True)
    columns = {"n": 10**40, "list": [1, None, {"x": 1.5}]}
    problems = [
        Problem(question="q", answer="4", key="q", columns=columns),
        Problem(question="zwölf", answer="", key=key, chat=chat),
    ]
    table = ProblemTable()
    for number, problem in enumerate(problems, start=5):
        table.add(problem, Place(Path("t"), number, "row"))
    assert [table.problem(i) for i in range(len(table))] == problems
    assert table.place(1) == Place(Path("t"), 6, "row")
    assert table.digest(1) == key_digest(key)


def test_what_json_has_not_becomes_text() -> None:
    table = ProblemTable()
    day, price = datetime.datetime(2026, 1, 2), decimal.Decimal("1.50")
    columns = {"day": day, "price": price, "image": b"\x01"}
    table.add(Problem(question="q", answer="", key="q", columns=columns), PLACE)
    assert table.problem(0).columns == {
        "day": "2026-01-02T00:00:00",
        "price": "1.50",
        "image": "AQ==",
    }


def test_rows_of_a_file_are_checked_and_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n\n{"prompt": "b", "answer": null}\n')
    source = open_source(path, field="task")
    with pytest.raises(InvalidRequest, match=r"t\.jsonl:3: the answer must be"):
        read_problems(source, "", find, field="task")
    table = read_problems(source, "", find_without_answer, field="task")
    assert [table.problem(i).answer for i in range(2)] == ["1", ""]
    path.write_text("\n")
    with pytest.raises(InvalidRequest, match=r"holds no problems; a row is such as {\"prompt\""):
        read_problems(source, "", find, field="task")


def test_a_column_that_nothing_can_write() -> None:
    class Odd:
        path = Path("t")

        def rows(self, split: str, *, field: str) -> list[Row]:
            return [Row(place=PLACE, columns={"prompt": "q", "answer": "a", "odd": object()})]

    with pytest.raises(InvalidRequest, match="t row 5: a column holds what JSON cannot"):
        read_problems(Odd(), "", find, field="task")  # type: ignore[arg-type]
