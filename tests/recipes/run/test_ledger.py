"""The ledger adds up, whatever the phases do."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from recipes.run.ledger import Ledger


def clock(*ticks: float) -> Callable[[], float]:
    return iter(ticks).__next__


def test_every_second_belongs_to_one_phase() -> None:
    ledger = Ledger(clock(0, 1, 4, 6, 7, 9, 10))
    with ledger.phase("generate"):
        pass
    with ledger.phase("train"):
        pass
    assert ledger.take() == {"other": 1 + 2 + 2, "generate": 3, "train": 1}


def test_an_inner_phase_takes_its_time_from_the_outer() -> None:
    ledger = Ledger(clock(0, 0, 2, 5, 6, 6))
    with ledger.phase("train"), ledger.phase("push"):
        pass
    assert ledger.take() == {"other": 0, "train": 3, "push": 3}


def test_a_failed_phase_is_closed() -> None:
    ledger = Ledger(clock(0, 1, 3, 8))
    with pytest.raises(RuntimeError), ledger.phase("train"):
        raise RuntimeError
    assert ledger.take() == {"other": 1 + 5, "train": 2}


def test_readings_add_up_to_the_wall_time() -> None:
    before = time.perf_counter()
    ledger = Ledger()
    began = time.perf_counter()
    total = 0.0
    for _ in range(3):
        with ledger.phase("a"):
            time.sleep(0.002)
        ending = time.perf_counter()
        total += sum(ledger.take().values())
    ended = time.perf_counter()
    assert total == pytest.approx(ledger.total)
    assert ending - began <= total <= ended - before
