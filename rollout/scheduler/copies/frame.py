"""The plans of all copies as one, and the result of that as one for each."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from engine.protocol import StepMasks, StepPlan
from rollout.scheduler.planning.plan_builder import no_rows


def framed(plans: Sequence[StepPlan | None], step: int) -> StepPlan:
    """The frame of a step. plans: of each copy, of that step; None where it has no rows."""
    first, *further = [no_rows(step) if plan is None else plan for plan in plans]
    return replace(first, further=further)


def split_masks(masks: StepMasks, plan: StepPlan) -> StepMasks:
    """The masks of a frame, for each copy. masks: its rows count the sampling rows of all copies,
    one behind the other (`first_rows`)."""
    starts = first_rows(plan)
    parts = []
    for copy, start in zip(plan.copies(), starts, strict=True):
        own = (masks.rows >= start) & (masks.rows < start + int(copy.samples.sum()))
        parts.append(StepMasks(step=masks.step, rows=masks.rows[own] - start, bits=masks.bits[own]))
    first, *further = parts
    return replace(first, further=further)


def first_rows(plan: StepPlan) -> list[int]:
    """The index of the first sampling row of each copy, among those of all."""
    counts = [int(copy.samples.sum()) for copy in plan.copies()]
    return [sum(counts[:index]) for index in range(len(counts))]
