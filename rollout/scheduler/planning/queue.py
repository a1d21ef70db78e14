"""The waiting requests and the order they are tried in."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator

from engine.config import QueuePolicy
from rollout.scheduler.sequence import Sequence

PREFIX_WINDOW = 128
"""Requests whose cached prefix is looked up per plan; the rest keep arrival order."""

Key = tuple[int, int, int]


class WaitingQueue:
    """Starved first; then by priority, retracted before new, longest cached prefix (if that
    is the policy), arrival.

    A plan passes a request over if it admits one that arrived later. The oldest waiting
    request has been passed over by every plan that passed a younger one over since it came,
    so it is enough to remember, of the latest arrival each plan admitted, the
    `starvation_steps` largest: whoever arrived before the least of them is starved.
    """

    def __init__(self, policy: QueuePolicy, starvation_steps: int) -> None:
        self._policy = policy
        self._starvation_steps = max(1, starvation_steps)
        self._ordered: list[Key] = []
        self._arrivals: list[int] = []
        self._by_arrival: dict[int, Sequence] = {}
        self._passes: list[int] = []

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Sequence]:
        """In order of arrival."""
        return (self._by_arrival[arrival] for arrival in list(self._arrivals))

    def push(self, sequence: Sequence) -> None:
        """Add a new or retracted sequence."""
        insort(self._ordered, _key(sequence))
        insort(self._arrivals, sequence.arrival)
        self._by_arrival[sequence.arrival] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is waiting."""
        del self._by_arrival[sequence.arrival]
        del self._ordered[bisect_left(self._ordered, _key(sequence))]
        del self._arrivals[bisect_left(self._arrivals, sequence.arrival)]

    def remove_many(self, sequences: list[Sequence]) -> None:
        """Take out sequences that are waiting; all of them costs no more than some."""
        gone = {sequence.arrival for sequence in sequences}
        if len(gone) < len(self._arrivals) // 8:
            for sequence in sequences:
                self.remove(sequence)
            return
        self._ordered = [key for key in self._ordered if key[2] not in gone]
        self._arrivals = [arrival for arrival in self._arrivals if arrival not in gone]
        for arrival in gone:
            del self._by_arrival[arrival]

    def candidates(self, cached_tokens: Callable[[Sequence], int]) -> Iterator[Sequence]:
        """The waiting sequences in the order to try them; the queue may shrink meanwhile.

        cached_tokens: length of a sequence's cached prefix, for policy 'longest_prefix'.
        """
        # Looked at lazily: a plan tries few of the many that may wait.
        limit = self._passes[0] if len(self._passes) >= self._starvation_steps else -1
        arrival = -1
        while (at := bisect_right(self._arrivals, arrival)) < len(self._arrivals):
            arrival = self._arrivals[at]
            if arrival >= limit:
                break
            yield self._by_arrival[arrival]
        last: Key | None = None
        if self._policy == "longest_prefix" and len(self._ordered) > 1:
            window = self._ordered[:PREFIX_WINDOW]
            last = window[-1]
            window = [key for key in window if key[2] >= limit]
            window.sort(
                key=lambda key: (key[0], key[1], -cached_tokens(self._by_arrival[key[2]]), key[2])
            )
            for key in window:
                yield self._by_arrival[key[2]]
        while (last := self._after(last)) is not None:
            if last[2] >= limit:
                yield self._by_arrival[last[2]]

    def _after(self, last: Key | None) -> Key | None:
        """The first key after `last`; the queue may have shrunk since that was seen."""
        at = 0 if last is None else bisect_right(self._ordered, last)
        return self._ordered[at] if at < len(self._ordered) else None

    def admitted(self, latest_arrival: int) -> None:
        """A plan admitted sequences, the youngest of which is `latest_arrival`."""
        heapq.heappush(self._passes, latest_arrival)
        if len(self._passes) > self._starvation_steps:
            heapq.heappop(self._passes)

    def check_integrity(self) -> None:
        """Assert that the three views hold the same sequences in order."""
        arrivals = [arrival for _, _, arrival in self._ordered]
        assert sorted(arrivals) == self._arrivals, "orders name different requests"
        assert set(self._by_arrival) == set(arrivals), "index names different requests"
        assert self._ordered == sorted(self._ordered), "queue out of order"


def _key(sequence: Sequence) -> Key:
    retracted = 0 if sequence.num_retractions else 1
    return (-sequence.request.priority, retracted, sequence.arrival)
