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
    slots = plan.slots[plan.samples]
    for row in plan.masked.tolist():
        slot = int(slots[row])
        if not table.masked[slot]:
            continue
        outputs = table.tokens[slot, table.prompt_len[slot] : table.num_tokens[slot]]
        request = running[slot].request
        found.append(MaskedRow(row=row, slot=slot, request=request, output_ids=outputs.copy()))
    return found
