"""Gathers what one step changes and computes, and turns it into a `StepPlan`."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

import numpy as np

from engine.protocol import NO_INTS, IntArray, NewRow, RouteRead, StepPlan
from rollout.booleans import BoolArray, every, some
from rollout.cache.radix_node import Match
from rollout.scheduler.planning.in_flight import InFlight
from rollout.scheduler.routes.kept import KeptRoutes
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence


class PlanBuilder:
    """One step being planned. Decode rows come in batch order; others in any."""

    def __init__(self, step: int, running: RunningSet) -> None:
        self.step = step
        self._running = running
        self._decode: IntArray = NO_INTS
        self._draft_lens: IntArray | None = None
        self._unsure = False
        self._rows: list[tuple[int, int, bool]] = []
        self._new_rows: list[NewRow] = []
        self._page_columns: list[tuple[IntArray, IntArray, IntArray]] = []
        self._page_runs: list[tuple[int, int, IntArray]] = []
        self._copies: list[tuple[int, int]] = []
        self._copied: list[Match] = []
        self._scored: list[int] = []

    @property
    def empty(self) -> bool:
        """Whether no row was added."""
        return len(self._decode) == 0 and not self._rows

    @property
    def decode(self) -> IntArray:
        """Slots of the decode rows, int32."""
        return self._decode

    @property
    def all_decode(self) -> bool:
        """Whether there are rows, and each of them decodes."""
        return len(self._decode) > 0 and not self._rows

    def set_draft_lens(self, lens: IntArray) -> None:
        """Drafts that each decode row of a step without others verifies; int32."""
        self._draft_lens = lens

    def set_decode(self, slots: IntArray, *, unsure: bool = False) -> None:
        """Rows that compute their newest token and sample the next; int32. unsure: how many tokens
        some have, or whether they have ended, only the ranks know."""
        self._decode = slots
        self._unsure = unsure

    def add_prefill(self, slot: int, num_tokens: int, *, sample: bool, last: bool) -> None:
        """A row that computes its next `num_tokens` known tokens."""
        self._rows.append((slot, num_tokens, sample))
        if last and not sample:
            self._scored.append(slot)

    def add_new_row(self, sequence: Sequence) -> None:
        """A sequence that took its slot in this plan."""
        slot = sequence.slot
        self._new_rows.append(
            NewRow(
                slot=slot,
                token_ids=sequence.tokens,
                prompt_len=sequence.prompt_len,
                sampling=sequence.row_sampling(),
                prompt_logprob_start=sequence.prompt_logprob_start,
                limit=int(self._running.table.max_tokens[slot]),
                forced_acceptance=sequence.request.forced_acceptance,
                pooling=sequence.pooling,
            )
        )

    def add_pages(self, slot: int, column: int, pages: IntArray) -> None:
        """page_table[slot, column:] = pages."""
        self._page_runs.append((slot, column, pages))

    def add_page_column(self, slots: IntArray, columns: IntArray, pages: IntArray) -> None:
        """page_table[slots, columns] = pages, one page for each slot."""
        self._page_columns.append((slots, columns, pages))

    def add_copy(self, match: Match, target: int) -> None:
        """Page `target` begins as a copy of the page `match` copies from.

        That page stays locked until the plan is built, lest this plan give it away.
        """
        assert match.source is not None
        self._copies.append((int(match.source.pages[0]), target))
        self._copied.append(match)

    def build(self, ones: IntArray) -> tuple[StepPlan, InFlight]:
        """The plan. ones: int32, at least as long as the decode rows, not to be written."""
        for match in self._copied:
            self._running.cache.release_source(match)
        slots, lens, samples = self._ordered(ones)
        table, drafts = self._running.table, self._running.drafts
        computed, draft_lens = table.num_computed[slots], NO_INTS
        if drafts is not None and self._has_bounds():
            draft_lens = np.zeros(len(slots), np.int32)
            if self._draft_lens is not None:
                draft_lens = self._draft_lens
            computed = computed - draft_lens
        copy_src = copy_dst = NO_INTS
        if self._copies:
            copy_src, copy_dst = np.array(self._copies, np.int32).T.copy()
        page_slots, page_columns, page_ids = self._page_writes()
        reads, keepers = self._running.routes.take()
        flight = self._in_flight(slots, samples, draft_lens if len(draft_lens) else None, keepers)
        masked = table.masked[flight.slots]
        plan = StepPlan(
            step=self.step,
            new_rows=self._new_rows,
            page_slots=page_slots,
            page_columns=page_columns,
            page_ids=page_ids,
            copy_src=copy_src,
            copy_dst=copy_dst,
            slots=slots,
            query_lens=lens,
            kv_lens=computed,
            samples=samples,
            draft_lens=draft_lens,
            sources=None if drafts is None else drafts.sources(),
            masked=np.flatnonzero(masked).astype(np.int32) if some(masked) else NO_INTS,
            route_reads=reads,
        )
        if drafts is not None:
            all_decode = self.all_decode
            drafts.planned(self.step, flight.slots, flight.draft_lens, all_decode=all_decode)
        return plan, flight

    def _page_writes(self) -> tuple[IntArray, IntArray, IntArray]:
        """Slots, columns and pages: those of rows that decode, then those of others, which have
        other slots."""
        parts = list(self._page_columns)
        if self._page_runs:
            slots, columns, pages = zip(*self._page_runs, strict=True)
            sizes = [len(ids) for ids in pages]
            # Those of a run are behind each other, however many came in runs before it.
            before = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
            ids: IntArray = np.concatenate(pages)
            start: IntArray = np.array(columns, np.int32) - before
            column: IntArray = np.arange(len(ids), dtype=np.int32)
            column += np.repeat(start, sizes)
            parts.append((np.repeat(np.array(slots, np.int32), sizes), column, ids))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return NO_INTS, NO_INTS, NO_INTS
        first, second, third = map(np.concatenate, zip(*parts, strict=True))
        return first, second, third

    def _has_bounds(self) -> bool:
        """Whether some row drafts, or did in a step that is still in flight."""
        return self._unsure or (self._draft_lens is not None and bool(self._draft_lens.any()))

    def _ordered(self, ones: IntArray) -> tuple[IntArray, IntArray, BoolArray]:
        count = len(self._decode)
        samples: BoolArray = np.ones(count, np.bool_)
        if not self._rows:
            return self._decode, ones[:count], samples
        rows = np.array(self._rows, np.int32).reshape(-1, 3)
        slots = np.concatenate((self._decode, rows[:, 0]))
        lens = np.concatenate((ones[:count], rows[:, 1]))
        samples = np.concatenate((samples, rows[:, 2].astype(np.bool_)))
        order = self._running.batch_order(slots)
        return slots[order], lens[order], samples[order]

    def _in_flight(
        self,
        slots: IntArray,
        samples: BoolArray,
        draft_lens: IntArray | None,
        routes: list[KeptRoutes],
    ) -> InFlight:
        uids = self._running.table.uid[slots]
        all_sample = every(samples)
        return InFlight(
            step=self.step,
            version=self._running.version,
            slots=slots if all_sample else slots[samples],
            uids=uids if all_sample else uids[samples],
            row_slots=slots,
            row_uids=uids,
            scored=self._scored,
            draft_lens=draft_lens if draft_lens is None or all_sample else draft_lens[samples],
            routes=routes,
        )


def no_rows(step: int, reads: Sequence_[RouteRead] = ()) -> StepPlan:
    """A step that computes nothing, and reads routes if there are any to read."""
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
        route_reads=list(reads),
    )


def rowless(step: int, running: RunningSet) -> tuple[StepPlan, InFlight]:
    """The step that reads what routes there are to read, and no more."""
    reads, keepers = running.routes.take()
    flight = InFlight(
        step=step,
        version=running.version,
        slots=NO_INTS,
        uids=np.empty(0, np.int64),
        row_slots=NO_INTS,
        row_uids=np.empty(0, np.int64),
        routes=keepers,
    )
    return no_rows(step, reads), flight
