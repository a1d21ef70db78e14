"""The order waiting requests are tried in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.config import QueuePolicy
from rollout.scheduler.encode import row_numbers
from rollout.scheduler.planning.queue import PREFIX_WINDOW, WaitingQueue
from rollout.scheduler.sequence import Sequence
from tests.helpers.scheduling import make_request


def sequence(arrival: int, priority: int = 0, retractions: int = 0) -> Sequence:
    request = make_request(str(arrival), [1, 2], priority=priority)
    return Sequence(
        request=request,
        arrival=arrival,
        group_order=arrival,
        numbers=row_numbers(request, 8),
        tokens=np.array([1, 2], np.int32),
        num_retractions=retractions,
    )


def order(queue: WaitingQueue, cached=lambda sequence: 0) -> list[int]:
    queue.check_integrity()
    return [candidate.arrival for candidate in queue.candidates(cached)]


def fill(queue: WaitingQueue, *sequences: Sequence) -> WaitingQueue:
    for each in sequences:
        queue.push(each)
    return queue


def test_arrival_order_with_fcfs():
    queue = fill(WaitingQueue("fcfs", 4), *(sequence(i) for i in (2, 0, 1)))
    assert order(queue, lambda s: s.arrival) == [0, 1, 2]


def test_longest_cached_prefix_first_then_arrival():
    queue = fill(WaitingQueue("longest_prefix", 4), *(sequence(i) for i in range(4)))
    assert order(queue, lambda s: {1: 8, 3: 8}.get(s.arrival, 0)) == [1, 3, 0, 2]


def test_priority_beats_prefix_and_retracted_beats_new():
    queue = fill(
        WaitingQueue("longest_prefix", 4),
        sequence(0),
        sequence(1, priority=5),
        sequence(2, retractions=1),
        sequence(3, priority=5),
    )
    assert order(queue, lambda s: 100 if s.arrival in (0, 3) else 0) == [3, 1, 2, 0]


def test_prefixes_are_looked_up_for_a_bounded_window():
    queue = fill(WaitingQueue("longest_prefix", 4), *(sequence(i) for i in range(300)))
    asked: list[int] = []

    def cached(candidate: Sequence) -> int:
        asked.append(candidate.arrival)
        return candidate.arrival

    found = order(queue, cached)
    assert sorted(asked) == list(range(PREFIX_WINDOW))
    assert found[:2] == [PREFIX_WINDOW - 1, PREFIX_WINDOW - 2]
    assert found[PREFIX_WINDOW:] == list(range(PREFIX_WINDOW, 300))


def test_passed_over_often_enough_goes_first():
    queue = fill(WaitingQueue("fcfs", 3), sequence(0), sequence(1))
    for arrival in (2, 3, 4):
        assert order(fill(queue, sequence(arrival, priority=9)))[0] == arrival
        queue.remove(next(s for s in queue if s.arrival == arrival))
        queue.admitted(arrival)
    fill(queue, sequence(5, priority=9))
    assert order(queue) == [0, 1, 5]


def test_being_behind_older_requests_is_not_being_passed_over():
    queue = fill(WaitingQueue("fcfs", 2), *(sequence(i) for i in range(5)))
    for arrival in range(3):
        queue.remove(next(s for s in queue if s.arrival == arrival))
        queue.admitted(arrival)
    fill(queue, sequence(9, priority=1))
    assert order(queue) == [9, 3, 4]


def test_remove_while_iterating():
    queue = fill(WaitingQueue("longest_prefix", 2), *(sequence(i) for i in range(6)))
    seen = []
    for candidate in queue.candidates(lambda s: -s.arrival):
        queue.remove(candidate)
        seen.append(candidate.arrival)
    assert seen == list(range(6)) and len(queue) == 0
    queue.check_integrity()


def test_many_are_removed_as_one_by_one():
    for gone in ([3], [0, 5, 7, 19], list(range(20))):
        sequences = [sequence(i, priority=i % 3, retractions=i % 2) for i in range(20)]
        queue = fill(WaitingQueue("fcfs", 4), *sequences)
        slow = fill(WaitingQueue("fcfs", 4), *sequences)
        queue.remove_many([sequences[i] for i in gone])
        for i in gone:
            slow.remove(sequences[i])
        assert order(queue) == order(slow)
        assert len(queue) == 20 - len(gone)


@pytest.mark.parametrize("policy", ["fcfs", "longest_prefix"])
def test_a_plan_looks_at_no_more_of_a_long_queue_than_it_tries(policy: QueuePolicy) -> None:
    class Counted(list[tuple[int, int, int]]):
        copied = 0

        def __iter__(self) -> Iterator[tuple[int, int, int]]:
            Counted.copied += len(self)
            return list.__iter__(self)

        def __getitem__(self, at: Any) -> Any:
            found = list.__getitem__(self, at)
            Counted.copied += len(found) if isinstance(at, slice) else 1
            return found

    queue = WaitingQueue(policy, starvation_steps=2)
    for arrival in range(5000):
        queue.push(sequence(arrival))
    queue._ordered = Counted(queue._ordered)
    candidates = queue.candidates(lambda _: 0)
    assert [next(candidates).arrival for _ in range(10)] == list(range(10))
    assert Counted.copied < 1000
