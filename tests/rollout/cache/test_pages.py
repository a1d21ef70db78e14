"""The page pool against a model that is a list of counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import OutOfMemory
from rollout.cache.pages import PagePool


def test_allocates_distinct_pages_and_refuses_more():
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfMemory, match="1 KV pages asked, 0 of 5"):
        pool.allocate(1)
    pool.check_integrity()


def test_page_is_free_only_after_its_last_release():
    pool = PagePool(2)
    page = pool.allocate(1)
    pool.retain(page)
    pool.release(page)
    assert pool.num_free == 1
    pool.release(page)
    assert pool.num_free == 2


def test_releasing_many_counts_a_page_as_often_as_it_is_named():
    pool = PagePool(6)
    pages = pool.allocate(4)
    pool.retain(pages[:2])
    pool.release_many(np.concatenate((pages[:1], pages[:1], pages[1:3])))
    assert pool.refcounts[pages].tolist() == [0, 1, 0, 1]
    pool.check_integrity()
    assert set(pool.allocate(4).tolist()) == {0, 1, 2, 3, 4, 5} - {pages[1], pages[3]}
    with pytest.raises(AssertionError, match="released a free page"):
        pool.release_many(np.array([pages[1], pages[1]], np.int32))


def test_misuse_is_caught():
    pool = PagePool(2)
    page = pool.allocate(1)
    pool.release(page)
    with pytest.raises(AssertionError, match="released a free page"):
        pool.release(page)
    with pytest.raises(AssertionError, match="retained a free page"):
        pool.retain(page)
    with pytest.raises(ValueError, match="num_pages"):
        PagePool(0)


def test_integrity_check_notices_a_lost_page():
    pool = PagePool(3)
    page = pool.allocate(1)
    pool.refcounts[page] = 0
    with pytest.raises(AssertionError, match="2 pages on the free stack, 3 pages without"):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.counts = [0] * 12

    @rule(count=st.integers(0, 13))
    def allocate(self, count: int) -> None:
        if count > self.counts.count(0):
            with pytest.raises(OutOfMemory):
                self.pool.allocate(count)
            return
        for page in self.pool.allocate(count):
            assert self.counts[page] == 0
            self.counts[page] = 1

    @precondition(lambda self: any(self.counts))
    @rule(data=st.data(), retain=st.booleans())
    def change(self, data: st.DataObject, retain: bool) -> None:
        used = [page for page, count in enumerate(self.counts) if count]
        pages = data.draw(st.lists(st.sampled_from(used), unique=True))
        (self.pool.retain if retain else self.pool.release)(np.array(pages, np.int32))
        for page in pages:
            self.counts[page] += 1 if retain else -1

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.refcounts.tolist() == self.counts
        assert self.pool.num_free == self.counts.count(0)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
