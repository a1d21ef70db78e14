"""The rows of a step whose next token a mask restricts."""

from __future__ import annotations

from engine.protocol import StepPlan
from rollout.masks.base import MaskedRow
from rollout.scheduler.running import RunningSet


def masked_rows(running: RunningSet, plan: StepPlan) -> list[MaskedRow]:
    """The rows of `plan.masked` that still run, with their output tokens.

    plan: the last that was planned, so that no slot of it has gone to another sequence; the results
    of all before it were applied.
    """
    table, found = running.table, []
    slots = plan.slots[plan.samples][plan.masked]
    columns = (plan.masked, slots, table.masked[slots], table.prompt_len[slots])
    ends = table.num_tokens[slots]
    for row, slot, masked, start, end in zip(*(c.tolist() for c in (*columns, ends)), strict=True):
        if masked:
            outputs = table.tokens[slot, start:end].copy()
            found.append(MaskedRow(row, slot, running[slot].request, outputs))
    return found
