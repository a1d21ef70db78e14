"""Which sources a row gets, case by case."""

from __future__ import annotations

import numpy as np

from engine.config import SpeculativeConfig
from engine.protocol import DraftSources, HistoryWrite
from rollout.scheduler.speculative.history import DraftHistory
from rollout.scheduler.speculative.segments import SegmentRing


class Table:
    """A history, and the table that its deltas give a rank."""

    def __init__(self, *, num_slots: int = 8, num_sources: int = 4, history_tokens: int = 400):
        config = SpeculativeConfig(history_tokens=history_tokens, num_sources=num_sources)
        self.history = DraftHistory(config, num_slots)
        self.sources = np.full((num_slots, num_sources), 99, np.int32)
        self.slots: set[int] = set()
        self.take()

    def take(self) -> DraftSources | None:
        delta = self.history.take()
        if delta is not None:
            assert delta.slots.dtype == delta.columns.dtype == delta.ids.dtype == np.int32
            self.sources[delta.slots, delta.columns] = delta.ids
        self.history.check_integrity(self.slots)
        return delta

    def row(self, slot: int) -> set[int]:
        self.take()
        return set(self.sources[slot].tolist()) - {-1}

    def enter(self, key: bytes, *slots: int) -> None:
        for slot in slots:
            self.history.enter(slot, key)
            self.slots.add(slot)

    def finish(self, slot: int, *, size: int = 50, version: int = 0, keep: bool = True) -> None:
        self.slots.remove(slot)
        self.history.leave(slot, prompt_len=20, size=size, version=version, keep=keep)


def test_the_first_delta_empties_the_tables_and_then_nothing_is_new() -> None:
    table = Table()
    assert (table.sources == -1).all()
    assert table.history.take() is None


def test_samples_of_a_prompt_draft_from_each_other() -> None:
    table = Table()
    table.enter(b"p", 0, 1, 2)
    table.enter(b"q", 3)
    assert [table.row(slot) for slot in range(4)] == [{1, 2}, {0, 2}, {0, 1}, set()]


def test_one_that_finishes_is_read_on_as_a_segment() -> None:
    table = Table()
    table.enter(b"p", 0, 1)
    table.take()
    table.finish(0)
    delta = table.take()
    assert delta is not None
    # From the 15 last tokens of its prompt on.
    assert delta.writes == [HistoryWrite(slot=0, start=5, stop=50, segment=0, at=0)]
    assert table.row(0) == set()
    assert table.row(1) == {-2}
    table.enter(b"q", 0)
    table.enter(b"p", 4)
    assert table.row(0) == set()
    assert table.row(4) == {1, -2}


def test_one_that_is_not_kept_leaves_room_for_another() -> None:
    table = Table(num_sources=1)
    table.enter(b"p", 0, 1, 2)
    assert table.row(0) == {1}
    table.finish(1, keep=False)
    assert table.row(0) == {2}
    table.finish(2, size=20)  # It has no outputs.
    assert table.row(0) == set()
    table.enter(b"p", 5)
    assert table.row(0) == {5}


def test_a_slot_that_is_taken_and_left_within_a_plan_is_not_written() -> None:
    table = Table()
    table.enter(b"p", 0)
    table.finish(0)
    assert table.take() is None
    table.enter(b"p", 1)
    assert table.row(1) == set()


def test_the_latest_finished_and_running_ones_share_the_columns() -> None:
    table = Table(num_slots=20)
    for _ in range(3):
        table.enter(b"p", *range(6))
        table.take()
        for slot in range(6):
            table.finish(slot, size=21)
        table.take()
    table.enter(b"p", *range(6, 10))
    table.enter(b"p", 10)
    row = table.row(10)
    assert {source for source in row if source >= 0} == {8, 9}
    assert {source for source in row if source < 0} == {-2 - 16, -2 - 17}


def test_texts_of_versions_long_gone_are_dropped() -> None:
    table = Table()
    table.enter(b"p", 0, 1, 2)
    table.take()
    table.finish(0)
    table.history.set_version(7)
    table.finish(1, version=7)
    assert table.row(2) == {-2, -3}
    table.history.set_version(9)
    table.history.set_version(9)
    table.history.set_version(10)
    assert table.row(2) == {-2, -3}
    table.history.set_version(11)
    assert table.row(2) == {-3}
    table.enter(b"p", 3)
    table.take()
    table.finish(3, version=0)
    assert table.row(2) == {-3}


def test_one_that_entered_a_plan_without_changes_is_kept_as_any_other() -> None:
    table = Table()
    table.enter(b"p", 0)
    assert table.take() is None
    table.finish(0)
    delta = table.take()
    assert delta is not None and [write.slot for write in delta.writes] == [0]


def test_a_version_that_serves_again_is_the_latest() -> None:
    table = Table()
    for version in (1, 2, 3, 4, 1):
        table.history.set_version(version)
    table.enter(b"p", 0, 1)
    table.take()
    table.finish(0, version=1)
    table.history.set_version(5)
    assert table.row(1) == {-2}


def test_what_is_overwritten_leaves_every_table() -> None:
    table = Table(history_tokens=100, num_slots=3)
    table.enter(b"p", 0)
    for turn in range(6):
        table.enter(b"p", 1)
        table.take()
        table.finish(1, size=30)  # A quarter of the places, 25.
        table.take()
        # Four fit: the oldest goes for the fifth.
        assert table.row(0) == {-2 - n for n in range(max(0, turn - 3), turn + 1)}


def test_a_text_that_is_overwritten_before_a_plan_is_not_written() -> None:
    table = Table(history_tokens=40, num_slots=8)
    table.enter(b"p", *range(8))
    table.take()
    for slot in range(7):
        table.finish(slot)
    delta = table.take()
    assert delta is not None
    places = [place for write in delta.writes for place in range(write.at, write.at + 10)]
    assert len(delta.writes) == 4 and len(set(places)) == 40


def test_numbers_of_segments_are_used_again_once_all_are_taken() -> None:
    ring = SegmentRing(1000, num_segments=2)
    first, _ = ring.add(5, b"a", 0)
    second, _ = ring.add(5, b"b", 0)
    third, dropped = ring.add(5, b"c", 0)
    assert dropped == [first] and third.number == first.number
    assert ring[third.number] is third and ring[second.number] is second
    assert (first.at, second.at, third.at) == (0, 5, 10)


def test_a_ring_skips_its_end_and_drops_what_lay_there() -> None:
    ring = SegmentRing(20, 100)
    made = [ring.add(size, b"a", 0)[0] for size in (5, 5, 5, 3, 2)]
    for old, size in zip(made, (5, 5, 5, 2), strict=False):
        assert ring.add(size, b"a", 0)[1] == [old]
    # Three places are left, [17, 20), with the last of the old ones in them.
    first = ring[5]
    later, dropped = ring.add(5, b"a", 0)
    assert later.at == 0 and dropped == [made[4], first]
