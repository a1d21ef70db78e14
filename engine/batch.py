"""From a `StepPlan` to tensors: the request tables of a rank, and the batch of one step.

Legend: R rows of the batch, T tokens computed in the step, S rows that sample,
P page columns, G tokens of a page.

The tables live on the device and are changed by the small deltas of each plan, so a steady
decode step sends no token, page or sampling parameter from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.base import AttentionBackend, AttentionBatch
from engine.attention.context import ForwardContext
from engine.kv.route_pool import RoutePool
from engine.protocol import NewRow, StepPlan
from engine.transfer import to_device


class RequestTable:
    """Tokens and pages of every slot, on the device.

    token_ids: int32 [slots, context]. length: int32 [slots], tokens known of each sequence.
    limit: int32 [slots], known tokens at which it ends. forced: float32 [slots], as
    `NewRow.forced_acceptance`. page_table: int32 [slots, P]; on a CPU both share
    memory with the numpy views `host_pages`, so reading them costs nothing. On a GPU
    `host_pages` is the host's copy: what the attention planner reads without a device sync.
    """

    def __init__(
        self, *, num_slots: int, context_length: int, page_size: int, device: torch.device
    ) -> None:
        columns = -(-context_length // page_size)
        self.page_size = page_size
        self.device = device
        self.host_pages = np.zeros((num_slots, columns), dtype=np.int32)
        self.token_ids = torch.zeros((num_slots, context_length), dtype=torch.int32, device=device)
        self._row_state = torch.zeros((3, num_slots), dtype=torch.int32, device=device)
        self.length, self.limit = self._row_state[0], self._row_state[1]
        self.forced = self._row_state[2].view(torch.float32)
        self.forced.fill_(-1.0)
        on_cpu = device.type == "cpu"
        pages = torch.from_numpy(self.host_pages)
        self.page_table = pages if on_cpu else pages.to(device)

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Write the known tokens of the sequences that enter a slot; one copy for all."""
        if not rows:
            return
        state = np.empty((4, len(rows)), np.int32)
        state[0] = [row.slot for row in rows]
        state[1] = [len(row.token_ids) for row in rows]
        state[2] = [row.limit for row in rows]
        state[3].view(np.float32)[:] = [row.forced_acceptance for row in rows]
        packed = to_device(state, self.device)
        self._row_state[:, packed[0].long()] = packed[1:]
        ids = to_device(np.concatenate([row.token_ids for row in rows]), self.device)
        parts = ids.split([len(row.token_ids) for row in rows])
        for row, part in zip(rows, parts, strict=True):
            self.token_ids[row.slot, : len(part)] = part

    def lengths(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`length` and `limit` of some slots on the host, int32; waits for the steps in flight."""
        state = self._row_state[:2, to_device(slots.astype(np.int64), self.device)].cpu().numpy()
        return state[0], state[1]

    def set_pages(self, plan: StepPlan) -> None:
        """Apply the page-table delta of a plan."""
        if len(plan.page_ids) == 0:
            return
        self.host_pages[plan.page_slots, plan.page_columns] = plan.page_ids
        if self.device.type != "cpu":
            packed = np.stack([plan.page_slots, plan.page_columns, plan.page_ids])
            slots, columns, ids = to_device(packed, self.device).unbind(0)
            self.page_table[slots.long(), columns.long()] = ids

    def append(self, slots_S: torch.Tensor, at_S: torch.Tensor, token_S: torch.Tensor) -> None:
        """Store sampled tokens at index `at` of their sequence (dropped past the context)."""
        self.length[slots_S] = (at_S + 1).to(torch.int32)
        fits = at_S < self.token_ids.shape[1]
        at_S = at_S.clamp(max=self.token_ids.shape[1] - 1)
        kept = torch.where(fits, token_S.to(torch.int32), self.token_ids[slots_S, at_S])
        self.token_ids[slots_S, at_S] = kept


@dataclass(frozen=True)
class StepBatch:
    """One step's tensors. context: what the model's layers are given.

    input_ids_T: int64 [T]. last_T_of_S: int64 [S], index into T of each sampling
    row's last token. slots_S, kv_lens_S: int64 [S]. query_start_R1: int64 numpy [R + 1], where
    each row begins among the T, and T.
    """

    input_ids_T: torch.Tensor
    last_T_of_S: torch.Tensor
    slots_S: torch.Tensor
    kv_lens_S: torch.Tensor
    query_start_R1: np.ndarray
    context: ForwardContext


def token_layout(plan: StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flatten a plan's rows into tokens: (slot_T, position_T, query_start_R1), all int64."""
    lens = plan.query_lens.astype(np.int64)
    starts = np.zeros(len(lens) + 1, dtype=np.int64)
    np.cumsum(lens, out=starts[1:])
    first = plan.kv_lens.astype(np.int64) - lens
    slot_T = np.repeat(plan.slots.astype(np.int64), lens)
    position_T = np.arange(starts[-1]) + np.repeat(first - starts[:-1], lens)
    return slot_T, position_T, starts


def build_batch(
    plan: StepPlan,
    table: RequestTable,
    attention: AttentionBackend,
    routes: RoutePool | None = None,
) -> StepBatch:
    """Gather the tensors of one step from the tables; one host-to-device copy for all of it.
    routes: where those of the step belong, if they are kept."""
    slot_T, position_T, starts = token_layout(plan)
    sampling = np.flatnonzero(plan.samples)
    num_tokens, num_samples = len(slot_T), len(sampling)
    packed = to_device(
        np.concatenate(
            [
                slot_T,
                position_T,
                starts[1:][sampling] - 1,
                plan.slots[sampling].astype(np.int64),
                plan.kv_lens[sampling].astype(np.int64),
            ]
        ),
        table.device,
    )
    slots, positions, last, slots_S, kv_lens_S = packed.split(
        [num_tokens, num_tokens, num_samples, num_samples, num_samples]
    )
    page = table.page_table[slots, positions // table.page_size]
    write_slots_T = page.long() * table.page_size + positions % table.page_size
    batch = AttentionBatch(
        query_start_R1=starts,
        kv_lens_R=plan.kv_lens.astype(np.int64),
        slots_R=plan.slots.astype(np.int64),
        host_pages=table.host_pages,
        page_table=table.page_table,
        write_slots_T=write_slots_T,
        page_size=table.page_size,
        device=table.device,
    )
    return StepBatch(
        input_ids_T=table.token_ids[slots, positions].long(),
        last_T_of_S=last,
        slots_S=slots_S,
        kv_lens_S=kv_lens_S,
        query_start_R1=starts,
        context=ForwardContext(
            positions,
            attention.prepare(batch),
            routes=None if routes is None else routes.step(write_slots_T),
        ),
    )
