"""How many pages to leave to running sequences when a new one wants in.

The estimate follows SGLang's new-token ratio (scheduler of Zheng et al., arXiv 2312.07104):
a running sequence is expected to use a share of the tokens it may still produce. The share
falls while all goes well and rises when pages ran out.
"""

from __future__ import annotations

import math

import numpy as np

from engine.protocol import IntArray
from rollout.scheduler.table import SlotTable

FIRST_RATIO = 0.7
LEAST_RATIO = 0.1
DECAY_STEPS = 600
RETRACT_RAISE = 0.2
MOST_FUTURE_TOKENS = 4096


class PageReserve:
    """The share, and the pages it keeps free."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._ratio = FIRST_RATIO

    def decay(self) -> None:
        """One step passed in which pages sufficed."""
        step = (FIRST_RATIO - LEAST_RATIO) / DECAY_STEPS
        self._ratio = max(LEAST_RATIO, self._ratio - step)

    def retracted(self) -> None:
        """Pages ran out: the estimate was too low."""
        self._ratio = min(1.0, self._ratio + RETRACT_RAISE)

    def pages_of(self, table: SlotTable, slot: int) -> int:
        """`pages_for` one slot."""
        known = max(int(table.target[slot]), int(table.num_tokens[slot]))
        future = min(max(int(table.max_tokens[slot]) - known, 0), MOST_FUTURE_TOKENS)
        pages = math.ceil((known + future * self._ratio) / self._page_size)
        return max(pages - int(table.num_pages[slot]), 0)

    def pages_for(self, table: SlotTable, slots: IntArray) -> int:
        """Pages that the sequences in `slots` (int32) are still expected to take."""
        if len(slots) == 0:
            return 0
        known = np.maximum(table.target[slots], table.num_tokens[slots])
        future = np.clip(table.max_tokens[slots] - known, 0, MOST_FUTURE_TOKENS) * self._ratio
        pages = np.ceil((known + future) / self._page_size) - table.num_pages[slots]
        return int(np.maximum(pages, 0).sum())
