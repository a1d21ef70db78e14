"""Steps whose lengths only the rank knows, and that draft nothing: the lengths are looked up first,
and what is left is an ordinary step.

Legend: R rows, S of them sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec.structs import replace as replace_struct

from engine.batch import RequestTable
from engine.mask_table import RowMasks
from engine.pending import PendingStep, Runs
from engine.protocol import StepPlan
from engine.transfer import Fetch


@dataclass(frozen=True)
class Resolved:
    """A plan with the lengths that its rows have, without those that have reached their limit.

    plan: no bounds, no drafts. kept_R: bool, rows of the original plan that it has.
    """

    plan: StepPlan
    kept_R: np.ndarray

    def masks(self, masks: RowMasks, original: StepPlan) -> RowMasks:
        """The masks of the original plan as those of this one."""
        kept_S = self.kept_R[original.samples]
        kept_M = kept_S[masks.rows]
        rows = (np.cumsum(kept_S) - 1)[masks.rows[kept_M]].astype(np.int32)
        return replace(masks.of(kept_M), rows=rows)


def resolve(plan: StepPlan, table: RequestTable) -> Resolved:
    """Look up how long the sampling rows of a plan with bounds are; waits for steps in flight."""
    length, limit = table.lengths(plan.slots)
    kv_lens = np.where(plan.samples, length, plan.kv_lens).astype(np.int32)
    kept = ~plan.samples | (length < limit)
    exact = replace_struct(
        plan,
        slots=plan.slots[kept],
        query_lens=plan.query_lens[kept],
        kv_lens=kv_lens[kept],
        samples=plan.samples[kept],
        draft_lens=plan.draft_lens[:0],
    )
    return Resolved(exact, kept)


def as_runs(pending: PendingStep, plan: StepPlan, kept_R: np.ndarray) -> PendingStep:
    """The pending step of a resolved plan as that of the plan itself, whose rows got one token
    each, or none if they were at their limit."""
    rows = np.flatnonzero(kept_R)
    counts_S = kept_R[plan.samples].astype(np.int32)
    counts = torch.from_numpy(np.stack([counts_S, np.zeros_like(counts_S)]))
    starts_S = np.cumsum(counts_S).astype(np.int64) - counts_S
    top = pending.top
    if top is not None:
        top = replace(top, rows=np.flatnonzero(counts_S)[top.rows].astype(np.int32))
    pooled = pending.pooled
    if pooled is not None:
        pooled = replace(pooled, rows=rows[pooled.rows].tolist())
    return replace(
        pending,
        num_rows=len(counts_S),
        top=top,
        prompt=[replace_struct(part, row=int(rows[part.row])) for part in pending.prompt],
        runs=Runs(starts_S, Fetch(counts)),
        pooled=pooled,
    )
