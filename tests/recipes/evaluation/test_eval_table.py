"""Figures as a line and as a table."""

from __future__ import annotations

import io

from rich.console import Console

from recipes.evaluation.eval_table import by_set, table, tell


def test_a_set_is_told_in_a_line() -> None:
    figures = {
        "eval/accuracy": 0.5,
        "eval/a/accuracy": 0.5,
        "eval/a/accuracy/stderr": 0.1,
        "eval/a/pass@4": 0.75,
        "eval/a/num_failed": 0.0,
        "eval/b/accuracy": 1.0,
        "eval/b/num_failed": 2.0,
    }
    assert tell(figures) == [
        "a: accuracy 0.500 ± 0.100, pass@4 0.750",
        "b: accuracy 1.000, num_failed 2",
    ]
    assert tell(figures, ["a"]) == [
        "a: reward 0.500 ± 0.100, pass@4 0.750",
        "b: accuracy 1.000, num_failed 2",
    ]


def test_a_reward_is_no_accuracy_of_the_table_either() -> None:
    out = io.StringIO()
    sets = {"a": {"accuracy": -3.5, "accuracy/stderr": 0.25}, "b": {"accuracy": 1.0}}
    Console(file=out, width=120).print(table(sets, ["a"]))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["set", "reward", "accuracy"],
        ["a", "-3.500", "±", "0.250", "-"],
        ["b", "-", "1.000"],
    ]


def test_a_table_has_a_row_a_set_and_the_error_beside_its_figure() -> None:
    figures = {
        "eval/accuracy": 0.5,
        "eval/a/accuracy": 0.5,
        "eval/a/accuracy/stderr": 0.1,
        "eval/b/pass@4": 1.0,
        "eval/b/num_failed": 2.0,
    }
    sets = by_set(figures)
    assert sets["a"] == {"accuracy": 0.5, "accuracy/stderr": 0.1}
    out = io.StringIO()
    Console(file=out, width=120).print(table(sets))
    words = [line.split() for line in out.getvalue().splitlines()]
    assert words == [
        ["set", "accuracy", "pass@4", "num_failed"],
        ["a", "0.500", "±", "0.100", "-", "-"],
        ["b", "-", "1.000", "2"],
    ]
