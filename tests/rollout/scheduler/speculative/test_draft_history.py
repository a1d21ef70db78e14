"""What a row drafts from: running and finished sequences of its prompt, never anything else."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import SpeculativeConfig
from engine.protocol import DraftSources
from rollout.scheduler.speculative.history import DraftHistory

KEYS = [b"a", b"b", b"c"]


class Rank:
    """The tables of a rank, and of each slot the sequence it holds as the rank knows it."""

    def __init__(self, num_slots: int, num_sources: int, num_places: int) -> None:
        self.sources = np.full((num_slots, num_sources), 12345, np.int32)
        self.history = np.full(num_places, -1, np.int32)
        self.segments: dict[int, tuple[int, int]] = {}
        self.texts: dict[int, list[int]] = {}

    def plan(self, delta: DraftSources | None, entered: dict[int, list[int]]) -> None:
        """What a step plan does to the tables."""
        if delta is not None:
            for write in delta.writes:
                tokens = self.texts[write.slot][write.start : write.stop]
                assert len(tokens) == write.stop - write.start > 0
                assert write.at + len(tokens) <= len(self.history)
                self.history[write.at : write.at + len(tokens)] = tokens
                self.segments[write.segment] = (write.at, len(tokens))
            self.sources[delta.slots, delta.columns] = delta.ids
        self.texts.update(entered)

    def read(self, source: int) -> list[int]:
        """The tokens of a source."""
        if source >= 0:
            return self.texts[source]
        at, size = self.segments[-2 - source]
        return self.history[at : at + size].tolist()


class HistoryMachine(RuleBasedStateMachine):
    """Sequences enter and leave between plans. Every token names its prompt, so that one of
    another prompt shows: token = 100,000 * key + a number no other token has."""

    @initialize(
        num_slots=st.integers(1, 6),
        num_sources=st.integers(1, 4),
        num_places=st.sampled_from([8, 40, 200]),
    )
    def start(self, num_slots: int, num_sources: int, num_places: int) -> None:
        self.config = SpeculativeConfig(history_tokens=num_places, num_sources=num_sources)
        self.num_slots = num_slots
        self.history = DraftHistory(self.config, num_slots)
        self.rank = Rank(num_slots, num_sources, num_places)
        self.running: dict[int, tuple[int, int, list[int]]] = {}
        self.entered: dict[int, list[int]] = {}
        self.finished: list[tuple[int, int, list[int]]] = []
        self.next_token = 0
        self.version = 0
        self.plan()

    def tokens(self, key: int, count: int) -> list[int]:
        self.next_token += count
        return [key * 100_000 + self.next_token - i for i in range(count)]

    @precondition(lambda self: len(self.running) < self.num_slots)
    @rule(data=st.data(), key=st.integers(0, 2), prompt=st.integers(1, 20))
    def enter(self, data: st.DataObject, key: int, prompt: int) -> None:
        free = sorted(set(range(self.num_slots)) - set(self.running))
        slot = data.draw(st.sampled_from(free))
        text = self.tokens(key, prompt)
        self.history.enter(slot, KEYS[key])
        self.running[slot] = (key, prompt, text)
        self.entered[slot] = list(text)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.sampled_from([True, True, False]))
    def leave(self, data: st.DataObject, keep: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        key, prompt, text = self.running.pop(slot)
        size = data.draw(st.integers(prompt, len(text)))
        self.entered.pop(slot, None)
        self.history.leave(slot, prompt_len=prompt, size=size, version=self.version, keep=keep)
        if keep and size > prompt:
            self.finished.append((key, self.version, text[:size]))

    @rule(count=st.integers(1, 8))
    def plan(self, count: int = 1) -> None:
        """A plan, and then a step that samples for the sequences that run."""
        self.rank.plan(self.history.take(), self.entered)
        self.entered = {}
        for slot, (key, _, text) in self.running.items():
            text.extend(self.tokens(key, count))
            self.rank.texts[slot] = list(text)
        self.check_tables()

    @rule(by=st.integers(1, 3))
    def update(self, by: int) -> None:
        for _ in range(by):
            self.version += 1
            self.history.set_version(self.version)

    @rule()
    def fail(self) -> None:
        self.history = DraftHistory(self.config, self.num_slots)
        self.running, self.entered, self.finished = {}, {}, []
        self.rank.sources[:] = 12345

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "history"):
            self.history.check_integrity(set(self.running))

    def check_tables(self) -> None:
        for slot in range(self.num_slots):
            row = self.rank.sources[slot].tolist()
            if slot not in self.running:
                assert set(row) == {-1}
                continue
            key = self.running[slot][0]
            for source in [source for source in row if source != -1]:
                if source >= 0:
                    assert source != slot
                    assert self.running[source][0] == key
                else:
                    self.check_segment(key, self.rank.read(source))

    def check_segment(self, key: int, tokens: list[int]) -> None:
        """It ends as a finished sequence of that prompt does, of a version not long gone."""
        assert any(
            of == key and text[-len(tokens) :] == tokens and self.version - version <= 3
            for of, version, text in self.finished
        )


TestHistory = HistoryMachine.TestCase
TestHistory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
