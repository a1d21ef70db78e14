"""Planning the sequences past their prefill: one token each and what is drafted behind it, and the
pages these take."""

from __future__ import annotations

import numpy as np

from engine.protocol import IntArray
from rollout.booleans import every, some
from rollout.scheduler.planning.plan_builder import PlanBuilder
from rollout.scheduler.running import RunningSet


class DecodePlanner:
    """Plans every decoding sequence; the caller makes room when pages run out."""

    def __init__(self, running: RunningSet) -> None:
        self._running = running

    def num_missing_pages(self) -> int:
        """Pages the next decode step needs beyond those that can be had; idle sessions have given
        up theirs then."""
        cache = self._running.cache
        if len(self._running) <= cache.num_free:
            # One token each is one page each at most.
            return 0
        slots = self._slots()
        missing = int(self._missing(slots, self._next_computed(slots)).sum())
        cache.can_have(missing)
        return missing - cache.num_available

    def plan(self, builder: PlanBuilder) -> int:
        """Add all decode rows to `builder`; returns the tokens they compute."""
        slots = self._slots()
        if len(slots) == 0:
            return 0
        table, computed = self._running.table, self._next_computed(slots)
        self._take_pages(builder, slots, computed)
        unsure = False
        if self._running.drafts is not None:
            unsure = some(table.num_unsure[slots])
            end = table.max_tokens[slots] - 1
            least = table.num_computed[slots] - table.num_unsure[slots] + 1
            table.num_unsure[slots] = computed - np.minimum(least, end)
        table.num_computed[slots] = computed
        builder.set_decode(slots, unsure=unsure)
        return len(slots)

    def draft(self, builder: PlanBuilder) -> None:
        """Let the rows of a step in which all decode verify drafts, as many as the drafter wants
        and free pages hold."""
        drafts, slots = self._running.drafts, builder.decode
        # One that waits for masks samples apart from its forward pass.
        if drafts is None or some(self._running.table.masked[slots]):
            return
        lens = drafts.lens(slots)
        if some(lens):
            self._take_pages(builder, slots, self._running.table.num_computed[slots] + lens)
            drafts.drafted(slots, lens)
        builder.set_draft_lens(lens)

    def _slots(self) -> IntArray:
        """Decoding slots, less those whose last token a step in flight is sure to bring."""
        slots, table = self._running.decode_slots(), self._running.table
        computed = table.num_computed[slots]
        if self._running.drafts is not None:
            computed = computed - table.num_unsure[slots]
        more = computed < table.max_tokens[slots] - 1
        return slots if every(more) else slots[more]

    def _next_computed(self, slots: IntArray) -> IntArray:
        """Most tokens with KV once a step of one token each is done, int32 [R]."""
        table = self._running.table
        computed: IntArray = table.num_computed[slots] + 1
        if self._running.drafts is not None:
            computed = np.minimum(computed, table.max_tokens[slots] - 1)
        return computed

    def _missing(self, slots: IntArray, computed: IntArray) -> IntArray:
        """Pages that each row lacks for the KV of so many tokens, int32 [R]."""
        needed = -(-computed // self._running.cache.page_size)
        missing: IntArray = np.maximum(needed - self._running.table.num_pages[slots], 0)
        return missing

    def _take_pages(self, builder: PlanBuilder, slots: IntArray, computed: IntArray) -> None:
        """Give each row the pages that it lacks."""
        table, missing = self._running.table, self._missing(slots, computed)
        while some(missing):
            short = slots[missing > 0]
            pages = self._running.cache.allocate(len(short))
            assert pages is not None, "decode was planned without pages for it"
            columns = table.num_pages[short]
            table.page_table[short, columns] = pages
            table.num_pages[short] = columns + 1
            builder.add_page_column(short, columns, pages)
            missing = np.maximum(missing - 1, 0)
