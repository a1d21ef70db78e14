"""The figures of a run by step, from its metrics.jsonl and evaluations.jsonl as they grow.

A row is one of metrics.jsonl, with the figures of the evaluation after that step. Evaluations of
a step that has no row of its own, as the one before training, have a row by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from rollout.dashboard.runs.lenient_json import number_of, read_object
from rollout.dashboard.runs.line_tail import LineTail

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Figures after a step. taken: whether it is a step of training, and not an evaluation alone.
    What is not finite is NaN or an infinity here."""

    step: float
    figures: dict[str, float]
    taken: bool


class RunRows:
    """All rows so far. generation: another one when rows that were there are gone, as after a run
    was resumed from an earlier step. num_unread: lines that are no row."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[Row] = []
        self.generation = 0
        self.num_unread = 0
        self._metrics = LineTail(folder / METRICS)
        self._evaluations = LineTail(folder / EVALUATIONS)
        # A heap: of a long run all evaluations are here before its first step is.
        self._held: list[tuple[float, int, Row]] = []
        self._num_held = 0

    def refresh(self) -> None:
        """Take in what is new. Raises InvalidRequest (`run`) for a file that cannot be read."""
        # An evaluation is written before the row of its step: looked at second, it is there.
        metrics, evaluations = self._metrics.look(), self._evaluations.look()
        if metrics.anew or evaluations.anew:
            self._begin_anew()
            metrics, evaluations = self._metrics.look(), self._evaluations.look()
        for evaluation in self._read(evaluations.lines, taken=False):
            self._num_held += 1
            heappush(self._held, (evaluation.step, self._num_held, evaluation))
        for row in self._read(metrics.lines, taken=True):
            self._take(row)
        self._take_late_evaluations()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._evaluations.close()

    def _begin_anew(self) -> None:
        self._metrics.restart()
        self._evaluations.restart()
        self.generation += 1
        self.rows, self._held, self.num_unread = [], [], 0

    def _read(self, lines: list[bytes], *, taken: bool) -> list[Row]:
        found = [_row(line, taken=taken) for line in lines]
        rows = [row for row in found if row is not None]
        self.num_unread += len(found) - len(rows)
        return rows

    def _take(self, row: Row) -> None:
        """Add a step. One that was taken already is taken again, with all behind it."""
        if (self.rows and row.step < self.rows[-1].step) or self._is_taken(row.step):
            self.rows = [earlier for earlier in self.rows if earlier.step < row.step]
            self.generation += 1
        for evaluation in self._held_until(row.step):
            if evaluation.step == row.step:
                row = Row(step=row.step, figures=evaluation.figures | row.figures, taken=True)
            elif not self.rows or evaluation.step >= self.rows[-1].step:
                self.rows.append(evaluation)
        self.rows.append(row)

    def _held_until(self, step: float) -> Iterator[Row]:
        """Evaluations up to a step, which are held no longer."""
        while self._held and self._held[0][0] <= step:
            yield heappop(self._held)[2]

    def _is_taken(self, step: float) -> bool:
        return bool(self.rows) and self.rows[-1].taken and self.rows[-1].step == step

    def _take_late_evaluations(self) -> None:
        """Those of the last step, whose row is there already, and the one before training. The
        evaluation of a later step waits for the row of that step."""
        last = self.rows[-1].step if self.rows else 0.0
        for evaluation in self._held_until(last):
            known = self.rows[-1].figures if self.rows else {}
            if evaluation.step == last and not evaluation.figures.keys() <= known.keys():
                self.rows.append(evaluation)


def _row(line: bytes, *, taken: bool) -> Row | None:
    """None for a line that is no object with a step."""
    value = read_object(line)
    step = number_of(value.get("step")) if value else None
    if value is None or step is None or not (math.isfinite(step) and step >= 0):
        return None
    numbers = {name: number_of(figure) for name, figure in value.items() if name != "step"}
    figures = {name: number for name, number in numbers.items() if number is not None}
    return Row(step=step, figures=figures, taken=taken)
