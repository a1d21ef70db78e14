"""Rows of a run by step, with the evaluations before, between and after them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rollout.dashboard.runs import run_rows
from rollout.dashboard.runs.run_events import events_of
from rollout.dashboard.runs.run_rows import Row, RunRows


def write(path: Path, *rows: object) -> None:
    with path.open("a") as file:
        file.writelines(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def test_evaluations_are_with_the_row_of_their_step(tmp_path: Path) -> None:
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl"
    rows = RunRows(tmp_path)
    rows.refresh()
    assert rows.rows == []
    write(evaluations, {"step": 0, "eval/accuracy": 0.1})
    rows.refresh()
    assert [(r.step, r.taken) for r in rows.rows] == [(0, False)]
    write(metrics, {"step": 1, "reward": 0.5})
    rows.refresh()
    write(evaluations, {"step": 2, "eval/accuracy": 0.3, "eval/a/avg@4": 0.2})
    rows.refresh()
    assert [r.step for r in rows.rows] == [0, 1], "the row of step 2 is not written yet"
    write(metrics, {"step": 2, "reward": 0.6, "eval/accuracy": 0.3})
    write(metrics, {"step": 3, "reward": 0.7})
    rows.refresh()
    assert [r.step for r in rows.rows] == [0, 1, 2, 3]
    assert rows.rows[2].figures == {"reward": 0.6, "eval/accuracy": 0.3, "eval/a/avg@4": 0.2}
    write(evaluations, {"step": 3, "eval/accuracy": 0.9})
    rows.refresh()
    last = [(row.step, row.figures.get("eval/accuracy")) for row in rows.rows][-2:]
    assert last == [(3, None), (3, 0.9)], "what was shown stays as it is"
    assert rows.generation == 0
    whole = RunRows(tmp_path)
    whole.refresh()
    assert whole.rows[:3] == rows.rows[:3]
    assert whole.rows[3].figures == {"reward": 0.7, "eval/accuracy": 0.9}


def test_numbers_that_json_does_not_know_and_lines_that_are_no_rows(tmp_path: Path) -> None:
    write(
        tmp_path / "metrics.jsonl",
        {"step": 1, "a": math.nan, "b": -math.inf, "c": None, "d": "text", "e": True, "f": 10**400},
        "[1, 2]",
        '{"step": 2, "rew',
        "[" * 100_000,
        {"reward": 1.0},
        {"step": math.nan},
        {"step": -1},
        "\x00\xff",
        {"step": 2, "\ud800": 1.0},
    )
    rows = RunRows(tmp_path)
    rows.refresh()
    assert [row.step for row in rows.rows] == [1, 2]
    first = rows.rows[0].figures
    assert math.isnan(first["a"]) and math.isnan(first["c"]) and first["b"] == -math.inf
    assert first.keys() == {"a", "b", "c", "f"} and first["f"] == math.inf
    assert rows.num_unread == 7
    assert [name.encode() for name in rows.rows[1].figures]


def test_steps_that_are_taken_again_replace_those_they_follow(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write(metrics, *({"step": step, "reward": 0.0} for step in (1, 2, 3, 4)))
    rows = RunRows(tmp_path)
    rows.refresh()
    write(metrics, {"step": 3, "reward": 1.0}, {"step": 4, "reward": 1.0})
    rows.refresh()
    assert [(r.step, r.figures["reward"]) for r in rows.rows] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert rows.generation == 1
    write(metrics, {"step": 4, "reward": 2.0})
    rows.refresh()
    assert [(r.step, r.figures["reward"]) for r in rows.rows][-1] == (4, 2.0)
    assert rows.generation == 2
    metrics.write_text('{"step": 1, "reward": 5.0}\n')
    rows.refresh()
    assert [(r.step, r.figures["reward"]) for r in rows.rows] == [(1, 5.0)]
    assert rows.generation == 3
    rows.close()


def test_moments_are_dates_whatever_steps_say_they_took() -> None:
    took = {"timing_s/step": 9e8, "weight_version": 1.0}
    rows = [Row(step=float(n), figures=took, taken=True) for n in range(20_000)]
    for before in (-1e13, 1e9):
        moments = [event.at for event in events_of(rows, before=before)]
        assert min(moments) >= 0 and max(moments) < 8.64e12, "JavaScript's last date"


def test_a_step_looks_at_its_own_evaluations_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0

    class Counted(float):
        def __le__(self, other: float) -> bool:
            nonlocal compared
            compared += 1
            return float(self) <= other

    monkeypatch.setattr(run_rows, "number_of", Counted)
    write(tmp_path / "evaluations.jsonl", *({"step": n, "eval/accuracy": 1} for n in range(300)))
    write(tmp_path / "metrics.jsonl", *({"step": n, "reward": 1} for n in range(300)))
    rows = RunRows(tmp_path)
    rows.refresh()
    assert len(rows.rows) == 300 and rows.rows[-1].figures.keys() == {"reward", "eval/accuracy"}
    assert compared < 5 * 300
