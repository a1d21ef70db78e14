"""Steps whose lengths only the rank knows, kernel by kernel: on a CPU, and on a GPU those that no
graph serves.

The lengths are read from the device first, so attention is planned for what is there; what a graph
keeps on the device waits here for the steps in flight.

Legend: R rows, S of them sample, K most drafts of a row, V virtual rows that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec.structs import replace as replace_struct

from engine.attention.base import AttentionBackend, AttentionBatch
from engine.attention.stored import ForwardContext
from engine.batch import RequestTable, StepBatch
from engine.config import KernelBackend
from engine.pending import PendingStep, Runs
from engine.protocol import StepPlan
from engine.speculative.ngram import NgramDrafter
from engine.transfer import Fetch, to_device
from kernels.speculative.accept import accept
from kernels.speculative.rows import virtual_rows


@dataclass(frozen=True)
class Resolved:
    """A plan with the lengths that its rows have, without those that have reached their limit.

    plan: no bounds, no drafts. kept_R: bool, rows of the original plan that it has.
    """

    plan: StepPlan
    kept_R: np.ndarray


def resolve(plan: StepPlan, table: RequestTable) -> Resolved:
    """Look up how long the sampling rows of a plan with bounds are; waits for steps in flight."""
    length, limit = table.lengths(plan.slots)
    kv_lens = np.where(plan.samples, length, plan.kv_lens).astype(np.int32)
    kept = ~plan.samples | (length < limit)
    none = plan.draft_lens[:0]
    exact = replace_struct(
        plan,
        slots=plan.slots[kept],
        query_lens=plan.query_lens[kept],
        kv_lens=kv_lens[kept],
        samples=plan.samples[kept],
        draft_lens=none,
        least_kv_lens=none,
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
    return replace(
        pending,
        num_rows=len(counts_S),
        top=top,
        prompt=[replace_struct(part, row=int(rows[part.row])) for part in pending.prompt],
        runs=Runs(starts_S, Fetch(counts)),
    )


@dataclass(frozen=True)
class VerifyBatch:
    """Virtual rows of one step. batch: those that are valid, each a sampling row of one token.

    slots_V, kv_lens_V: int64 on the host. valid: bool [R, K + 1] on the host. The rest as
    `kernels.speculative` takes it.
    """

    batch: StepBatch
    slots_V: np.ndarray
    valid: np.ndarray
    slots_R: torch.Tensor
    drafts_RK: torch.Tensor
    drafted_R: torch.Tensor

    @property
    def starts_R(self) -> np.ndarray:
        """Where each row's virtual rows begin among the V, int64 [R]."""
        counts = self.valid.sum(axis=1)
        starts: np.ndarray = np.cumsum(counts) - counts
        return starts


def build_verify_batch(
    plan: StepPlan,
    table: RequestTable,
    drafter: NgramDrafter,
    attention: AttentionBackend,
    *,
    scratch_slot: int,
    backend: KernelBackend,
) -> VerifyBatch:
    """Draft for the rows of a plan in which all decode, and lay out what verifies the drafts."""
    device, num_drafts = table.device, int(plan.draft_lens.max())
    slots_R, lens_R = to_device(np.stack([plan.slots, plan.draft_lens]), device).unbind(0)
    drafts_RK = torch.zeros((len(plan.slots), num_drafts), dtype=torch.int32, device=device)
    drafted_R = torch.zeros(len(plan.slots), dtype=torch.int32, device=device)
    drafter.propose(slots_R, lens_R, drafts_RK, drafted_R)
    rows = virtual_rows(
        slots_R,
        drafts_RK,
        drafted_R,
        length=table.length,
        limit=table.limit,
        token_ids=table.token_ids,
        page_table=table.page_table,
        page_size=table.page_size,
        scratch_slot=scratch_slot,
        backend=backend,
    )
    valid = rows.valid_V
    slots_V, kv_lens_V = rows.slots_V[valid].long(), rows.kv_lens_V[valid].long()
    slots, kv_lens = slots_V.cpu().numpy(), kv_lens_V.cpu().numpy()
    starts = np.arange(len(slots) + 1, dtype=np.int64)
    step = attention.prepare(
        AttentionBatch(
            query_start_R1=starts,
            kv_lens_R=kv_lens,
            slots_R=slots,
            host_pages=table.host_pages,
            page_table=table.page_table,
            write_slots_T=rows.write_slots_V[valid],
            page_size=table.page_size,
            device=device,
        )
    )
    batch = StepBatch(
        input_ids_T=rows.input_ids_V[valid],
        last_T_of_S=torch.arange(len(slots), device=device),
        slots_S=slots_V,
        kv_lens_S=kv_lens_V,
        query_start_R1=starts,
        context=ForwardContext(rows.positions_V[valid], step),
    )
    return VerifyBatch(
        batch=batch,
        slots_V=slots,
        valid=valid.view(len(plan.slots), -1).cpu().numpy(),
        slots_R=slots_R,
        drafts_RK=drafts_RK,
        drafted_R=drafted_R,
    )


def accept_drawn(
    rows: VerifyBatch, token_V: torch.Tensor, table: RequestTable, *, backend: KernelBackend
) -> Runs:
    """Append what counts of the tokens drawn from the virtual rows, int64 [V]."""
    device = table.device
    places = to_device(np.flatnonzero(rows.valid.reshape(-1)), device)
    tokens = torch.zeros(rows.valid.size, dtype=torch.int64, device=device)
    tokens[places] = token_V
    counts_R = torch.zeros_like(rows.drafted_R)
    accept(
        tokens,
        rows.slots_R,
        rows.drafts_RK,
        rows.drafted_R,
        length=table.length,
        limit=table.limit,
        forced=table.forced,
        token_ids=table.token_ids,
        counts_R=counts_R,
        backend=backend,
    )
    return Runs(rows.starts_R, Fetch(torch.stack([counts_R, rows.drafted_R])))
