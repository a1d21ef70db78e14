"""The plans of all copies as one, and the result of that as one for each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from msgspec.structs import replace

from engine.protocol import StepPlan
from rollout.scheduler.planning.plan_builder import no_rows


def framed(plans: Sequence[StepPlan | None], step: int) -> StepPlan:
    """The frame of a step. plans: of each copy, of that step; None where it has no rows."""
    first, *further = [no_rows(step) if plan is None else plan for plan in plans]
    return replace(first, further=further)


def rows_of_copies(rows: Sequence[int], plan: StepPlan) -> list[slice]:
    """Which of `rows` are of each copy. rows: ascending, counting the sampling rows of all copies,
    one behind the other (`first_rows`)."""
    bounds = [*(bisect_left(rows, first) for first in first_rows(plan)), len(rows)]
    return [slice(start, end) for start, end in pairwise(bounds)]


def first_rows(plan: StepPlan) -> list[int]:
    """The index of the first sampling row of each copy, among those of all."""
    counts = [int(copy.samples.sum()) for copy in plan.copies()]
    return [sum(counts[:index]) for index in range(len(counts))]
