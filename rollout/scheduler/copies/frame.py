"""The plans of all copies as one, and the result of that as one for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from engine.protocol import NO_INTS, StepMasks, StepPlan


def framed(plans: Sequence[StepPlan | None], step: int) -> StepPlan:
    """The frame of a step. plans: of each copy, of that step; None where it has no rows."""
    first, *further = [_rowless(step) if plan is None else plan for plan in plans]
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


def _rowless(step: int) -> StepPlan:
    return StepPlan(
        step=step,
        new_rows=[],
        page_slots=NO_INTS,
        page_columns=NO_INTS,
        page_ids=NO_INTS,
        copy_src=NO_INTS,
        copy_dst=NO_INTS,
        slots=NO_INTS,
        query_lens=NO_INTS,
        kv_lens=NO_INTS,
        samples=np.empty(0, np.bool_),
    )
