"""Taking running sequences back to the queue when pages run out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollout.scheduler.planning.page_reserve import PageReserve
from rollout.scheduler.planning.queue import WaitingQueue
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence


class Preemption:
    """Chooses victims and retracts them: KV given up, tokens and logprobs kept.

    A retracted sequence is prefilled again later, prompt and outputs at once; since tokens
    are drawn by (seed, position), its outputs are those of an undisturbed run.
    """

    def __init__(self, running: RunningSet, queue: WaitingQueue, reserve: PageReserve) -> None:
        self._running = running
        self._queue = queue
        self._reserve = reserve
        self.num_retractions = 0

    def make_room(self, num_missing: Callable[[], int], step: int) -> None:
        """Retract until every decoding sequence can have its next page. num_missing: pages that
        they lack."""
        if num_missing() <= 0:
            self._reserve.decay()
            return
        while num_missing() > 0:
            self.retract_one(step)

    def retract_one(self, step: int) -> None:
        """Retract the sequence that loses least; its KV stays cached until overwritten."""
        assert len(self._running) > 1, "a lone sequence ran out of pages"
        self._reserve.retracted()
        self.retract(self._victim(), step, keep_kv=True)

    def retract(self, sequence: Sequence, step: int, *, keep_kv: bool) -> None:
        """Send one running sequence back to the front of the queue."""
        self._running.stop(sequence, step=step, keep_kv=keep_kv, comes_back=True)
        sequence.drop_kv()
        sequence.num_retractions += 1
        self.num_retractions += 1
        self._queue.push(sequence)

    def _victim(self) -> Sequence:
        """Lowest priority, then fewest outputs, then latest arrival."""
        table, slots = self._running.table, self._running.slots()
        outputs = table.num_tokens[slots] - table.prompt_len[slots]
        order = np.lexsort((-table.arrival[slots], outputs, table.priority[slots]))
        return self._running[int(slots[order[0]])]
