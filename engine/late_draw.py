"""Decode steps of which a graph computed the logits, and whose draw comes later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import RequestTable
from engine.mask_table import RowMasks
from engine.pending import PendingStep, Runs, pack_sampled
from engine.protocol import StepPlan
from engine.sampling import Sampler
from engine.transfer import Fetch
from kernels.speculative.accept import accept


@dataclass(frozen=True)
class DecodeLogits:
    """What a replay that ends with the logits left of R rows, one a sequence.

    logits_SV: in a static buffer that the next such replay overwrites. slots_S, kv_lens_S: int64
    [R]; the scratch slot in the place of a sequence that has reached its limit.
    """

    logits_SV: torch.Tensor
    slots_S: torch.Tensor
    kv_lens_S: torch.Tensor


def draw_late(
    plan: StepPlan,
    computed: DecodeLogits,
    sampler: Sampler,
    table: RequestTable,
    masks: RowMasks | None,
) -> PendingStep:
    """Queue the draw of a step that drafts nothing, and append what came."""
    num_rows, device = len(plan.slots), table.device
    drawn = sampler.draw(computed.logits_SV, computed, plan.slots, table, masks)
    slots_R = computed.slots_S.to(torch.int32)
    counts_2R = torch.zeros((2, num_rows), dtype=torch.int32, device=device)
    accept(
        drawn.token_S,
        slots_R,
        torch.zeros((num_rows, 0), dtype=torch.int32, device=device),
        counts_2R[1],
        length=table.length,
        limit=table.limit,
        forced=table.forced,
        token_ids=table.token_ids,
        counts_R=counts_2R[0],
        backend="triton",
    )
    runs = None
    if len(plan.draft_lens):
        runs = Runs(np.arange(num_rows, dtype=np.int64), Fetch(counts_2R))
    fetch = Fetch(pack_sampled(drawn.token_S, drawn.logprob_S, drawn.entropy_S))
    return PendingStep(plan.step, fetch, num_rows=num_rows, runs=runs)
