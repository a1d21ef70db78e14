"""The rows of a step whose next token a mask restricts."""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import StepPlan
from rollout.masks.base import MaskedRow
from rollout.scheduler.copies.frame import first_rows
from rollout.scheduler.running import RunningSet


def masked_rows(copies: Sequence[RunningSet], plan: StepPlan) -> list[MaskedRow]:
    """The rows of `plan.masked`, of every copy, that still run, with their output tokens.

    copies: the sequences that run on each. plan: the last that was planned, so that no slot of it
    has gone to another sequence; the results of all before it were applied.
    """
    found: list[MaskedRow] = []
    starts = first_rows(plan)
    for copy, (running, own) in enumerate(zip(copies, plan.copies(), strict=True)):
        found += _of_copy(running, own, copy=copy, first=starts[copy])
    return found


def _of_copy(running: RunningSet, plan: StepPlan, *, copy: int, first: int) -> list[MaskedRow]:
    """first: index of its first sampling row."""
    table, found = running.table, []
    slots = plan.slots[plan.samples][plan.masked]
    columns = (plan.masked, slots, table.masked[slots], table.prompt_len[slots])
    ends = table.num_tokens[slots]
    for row, slot, masked, start, end in zip(*(c.tolist() for c in (*columns, ends)), strict=True):
        if masked:
            outputs = table.tokens[slot, start:end].copy()
            found.append(MaskedRow(first + row, slot, running[slot].request, outputs, copy))
    return found
