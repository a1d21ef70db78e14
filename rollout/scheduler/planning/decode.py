"""Planning the sequences past their prefill: one token each, a page where one is full."""

from __future__ import annotations

from engine.protocol import IntArray
from rollout.scheduler.planning.plan_builder import PlanBuilder
from rollout.scheduler.running import RunningSet


class DecodePlanner:
    """Plans every decoding sequence; the caller makes room when pages run out."""

    def __init__(self, running: RunningSet) -> None:
        self._running = running

    def num_missing_pages(self) -> int:
        """Pages the next decode step needs beyond those that can be had."""
        slots = self._slots()
        full = self._running.table.num_computed[slots] % self._running.cache.page_size == 0
        return int(full.sum()) - self._running.cache.num_available

    def plan(self, builder: PlanBuilder) -> int:
        """Add all decode rows to `builder`; returns the tokens they compute."""
        slots = self._slots()
        if len(slots) == 0:
            return 0
        table, cache = self._running.table, self._running.cache
        computed = table.num_computed[slots]
        full = slots[computed % cache.page_size == 0]
        if len(full):
            pages = cache.allocate(len(full))
            assert pages is not None, "decode was planned without pages for it"
            columns = table.num_pages[full]
            table.page_table[full, columns] = pages
            table.num_pages[full] = columns + 1
            builder.add_page_column(full, columns, pages)
        table.num_computed[slots] = computed + 1
        builder.set_decode(slots)
        return len(slots)

    def _slots(self) -> IntArray:
        """Decoding slots, less those whose last token a step in flight will bring."""
        slots, table = self._running.decode_slots(), self._running.table
        more = table.num_computed[slots] < table.max_tokens[slots] - 1
        return slots if more.all() else slots[more]
