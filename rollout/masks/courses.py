"""The rows of a step whose next token a mask restricts, and the masks that are known beforehand.

A row that went on as its source has foreseen needs no look at its tokens: the source is asked about
the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.protocol import StepPlan
from rollout.masks.base import Course, KnownMask, MaskedRow
from rollout.scheduler.copies.frame import first_rows
from rollout.scheduler.running import RunningSet


@dataclass(frozen=True)
class RowsToMask:
    """known: masks by row. unknown: rows to ask for. Rows count the sampling rows of all copies."""

    known: dict[int, KnownMask] = field(default_factory=dict)
    unknown: list[MaskedRow] = field(default_factory=list)


class _Slots:
    """Of every slot of one copy: the sequence that was last seen there, how many tokens it had, and
    where its output stood then."""

    def __init__(self, num_slots: int) -> None:
        self.uids = np.zeros(num_slots, np.int64)
        self.sizes = np.zeros(num_slots, np.int64)
        self.courses: list[Course | None] = [None] * num_slots


class Courses:
    """Where the outputs of masked rows stand, from step to step."""

    def __init__(self, num_copies: int, num_slots: int) -> None:
        self._copies = [_Slots(num_slots) for _ in range(num_copies)]

    def rows(self, copies: Sequence[RunningSet], plan: StepPlan) -> RowsToMask:
        """The rows of `plan.masked`, of every copy, that still run.

        copies: the sequences that run on each. plan: the last that was planned, so that no slot of
        it has gone to another sequence; the results of all before it were applied.
        """
        found, firsts = RowsToMask(), first_rows(plan)
        for copy, (running, own) in enumerate(zip(copies, plan.copies(), strict=True)):
            self._add(found, running, own, copy, firsts[copy])
        return found

    def enter(self, row: MaskedRow, course: Course) -> None:
        """Where the output of a row stands, of the rows that were given last."""
        self._copies[row.copy].courses[row.slot] = course

    def _add(
        self, found: RowsToMask, running: RunningSet, plan: StepPlan, copy: int, first: int
    ) -> None:
        """first: index of the first sampling row of the copy."""
        table, seen = running.table, self._copies[copy]
        slots = plan.slots[plan.samples][plan.masked]
        runs = table.masked[slots]
        rows, slots = plan.masked[runs] + first, slots[runs]
        uids, ends = table.uid[slots], table.num_tokens[slots]
        # The tokens of a sequence that keeps its slot are never changed.
        goes_on = (seen.uids[slots] == uids) & (seen.sizes[slots] + 1 == ends)
        seen.uids[slots], seen.sizes[slots] = uids, ends
        columns = (rows, slots, table.tokens[slots, ends - 1], goes_on)
        courses, known = seen.courses, found.known
        for row, slot, token, goes in zip(*(column.tolist() for column in columns), strict=True):
            course = courses[slot] if goes else None
            if course is not None:
                course = course.after(token)
            courses[slot] = course
            mask = None if course is None else course.mask
            if mask is not None:
                known[row] = mask
                continue
            outputs = table.tokens[slot, table.prompt_len[slot] : table.num_tokens[slot]].copy()
            request = running[slot].request
            found.unknown.append(MaskedRow(row, slot, request, outputs, copy, course))
