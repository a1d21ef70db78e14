"""Steps that verify drafts, kernel by kernel: on a CPU, and on a GPU those that no graph serves.

Which virtual rows there are is read from the device, so that attention is planned for them alone;
what a graph keeps on the device waits here for the steps in flight.

Legend: R rows, K most drafts of a row, V virtual rows that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.attention.base import AttentionBackend, AttentionBatch
from engine.attention.context import ForwardContext
from engine.attention.spoilt import spoilt_rows
from engine.batch import RequestTable, StepBatch
from engine.kv.route_pool import RoutePool
from engine.models.build import Model
from engine.numerics import kernel_backend
from engine.pending import PendingStep, Runs, pack_sampled
from engine.protocol import StepPlan
from engine.sampling import Sampler
from engine.speculative.ngram import NgramDrafter
from engine.transfer import Fetch, to_device
from kernels.speculative.accept import accept
from kernels.speculative.rows import VirtualRows, virtual_rows


@dataclass(frozen=True)
class VerifyBatch:
    """Virtual rows of one step. batch: those that are valid, each a sampling row of one token.

    slots_V: int64 on the host. valid: bool [R, K + 1] on the host. The rest as
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


class Verifier:
    """Runs steps in which every row decodes and some verify drafts.

    scratch_slot: a slot that no request takes, whose page is of nobody. routes: where those of the
    rows belong, if they are kept.
    """

    def __init__(
        self,
        model: Model,
        table: RequestTable,
        sampler: Sampler,
        attention: AttentionBackend,
        drafter: NgramDrafter,
        *,
        scratch_slot: int,
        routes: RoutePool | None = None,
    ) -> None:
        self._model = model
        self._table = table
        self._sampler = sampler
        self._attention = attention
        self._drafter = drafter
        self._scratch_slot = scratch_slot
        self._routes = routes
        self._backend = kernel_backend(table.device)

    def run(self, plan: StepPlan) -> PendingStep:
        """Draft, compute the virtual rows, draw from each, and append what counts."""
        rows = self._lay_out(plan)
        batch, slots = rows.batch, rows.slots_V
        hidden_VH = self._model(batch.input_ids_T, batch.context)
        spoilt_V = spoilt_rows(batch.context.step)
        if spoilt_V is not None:
            hidden_VH[torch.from_numpy(spoilt_V)] = float("nan")
        widen = self._table.device.type == "cpu" or self._sampler.edits(slots)
        logits = self._model.compute_logits(hidden_VH, widen=widen)
        drawn = self._sampler.draw(logits, batch, slots, self._table)
        runs = self._accept(rows, drawn.token_S)
        top = drawn.top
        if top is not None:
            # A row that wants other tokens' logprobs has no drafts, so it is one virtual row.
            row_of_V = np.repeat(np.arange(len(plan.slots)), rows.valid.sum(axis=1))
            top = replace(top, rows=row_of_V[top.rows].astype(np.int32))
        fetch = Fetch(pack_sampled(drawn.token_S, drawn.logprob_S, drawn.entropy_S))
        return PendingStep(plan.step, fetch, num_rows=len(plan.slots), top=top, runs=runs)

    def _lay_out(self, plan: StepPlan) -> VerifyBatch:
        """The rows' drafts, and what verifies them."""
        table, device, num_drafts = self._table, self._table.device, int(plan.draft_lens.max())
        slots_R, lens_R = to_device(np.stack([plan.slots, plan.draft_lens]), device).unbind(0)
        drafts_RK = torch.zeros((len(plan.slots), num_drafts), dtype=torch.int32, device=device)
        drafted_R = torch.zeros(len(plan.slots), dtype=torch.int32, device=device)
        self._drafter.propose(slots_R, lens_R, drafts_RK, drafted_R)
        rows = virtual_rows(
            slots_R,
            drafts_RK,
            drafted_R,
            length=table.length,
            limit=table.limit,
            token_ids=table.token_ids,
            page_table=table.page_table,
            page_size=table.page_size,
            scratch_slot=self._scratch_slot,
            backend=self._backend,
        )
        valid = rows.valid_V
        slots_V = rows.slots_V[valid].long()
        slots = slots_V.cpu().numpy()
        return VerifyBatch(
            batch=self._batch(rows, slots_V, slots),
            slots_V=slots,
            valid=valid.view(len(plan.slots), -1).cpu().numpy(),
            slots_R=slots_R,
            drafts_RK=drafts_RK,
            drafted_R=drafted_R,
        )

    def _batch(self, rows: VirtualRows, slots_V: torch.Tensor, slots: np.ndarray) -> StepBatch:
        """The valid ones of `rows` as a step of as many decode rows; their slots, and these on the
        host."""
        table, valid = self._table, rows.valid_V
        kv_lens_V, write_slots_V = rows.kv_lens_V[valid].long(), rows.write_slots_V[valid]
        starts = np.arange(len(slots_V) + 1, dtype=np.int64)
        step = self._attention.prepare(
            AttentionBatch(
                query_start_R1=starts,
                kv_lens_R=kv_lens_V.cpu().numpy(),
                slots_R=slots,
                host_pages=table.host_pages,
                page_table=table.page_table,
                write_slots_T=write_slots_V,
                page_size=table.page_size,
                device=table.device,
            )
        )
        return StepBatch(
            input_ids_T=rows.input_ids_V[valid],
            last_T_of_S=torch.arange(len(slots_V), device=table.device),
            slots_S=slots_V,
            kv_lens_S=kv_lens_V,
            query_start_R1=starts,
            context=ForwardContext(
                rows.positions_V[valid],
                step,
                routes=None if self._routes is None else self._routes.step(write_slots_V),
            ),
        )

    def _accept(self, rows: VerifyBatch, token_V: torch.Tensor) -> Runs:
        """Append what counts of the tokens drawn from the virtual rows, int64 [V]."""
        table, device = self._table, self._table.device
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
            backend=self._backend,
        )
        return Runs(rows.starts_R, Fetch(torch.stack([counts_R, rows.drafted_R])))
