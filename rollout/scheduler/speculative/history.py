"""Which texts each running sequence may draft from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from engine.config import SpeculativeConfig
from engine.protocol import DraftSources, HistoryWrite
from rollout.scheduler.speculative.segments import Segment, SegmentRing

_NUM_VERSIONS = 4
"""Texts sampled by the weights that serve and by the three versions before are drafted from."""
_PROMPT_TOKENS = 15
"""Last tokens of the prompt that a segment begins with, so that a match may begin in them: one less
than the longest match."""
_NONE = -1
_UNKNOWN = -(2**31)
"""What a rank's table holds nobody knows."""


@dataclass
class _Family:
    """Texts that begin with the same prompt. live: slots, in the order they entered; open: those of
    them with room for another source. segments: oldest first."""

    live: dict[int, None] = field(default_factory=dict)
    open: dict[int, None] = field(default_factory=dict)
    segments: dict[int, None] = field(default_factory=dict)


class DraftHistory:
    """The leader's side of the ranks' tables of sources, and of the history they hold.

    Sources of a row are the running sequences with the same prompt and the latest finished ones, up
    to `config.num_sources` and at first half of them of each kind where there are so many. One that
    finishes while others read it is read on as a segment of the history.

    Sources are numbered as in `DraftSources`: a slot, or -2 - segment, or -1. A new history takes
    the ranks' tables to hold anything, and its first `take` sets all of them: so it begins anew
    after a step that failed.
    """

    def __init__(self, config: SpeculativeConfig, num_slots: int) -> None:
        self._num_sources = config.num_sources
        self._versions: deque[int] = deque(maxlen=_NUM_VERSIONS)
        self._sent = np.full((num_slots, self._num_sources), _UNKNOWN, np.int32)
        self._segments = SegmentRing(config.history_tokens, config.num_segments)
        self._families: dict[bytes, _Family] = {}
        self._keys: dict[int, bytes] = {}
        self._rows: list[list[int]] = [[] for _ in range(num_slots)]
        self._readers: dict[int, set[int]] = {slot: set() for slot in range(num_slots)}
        self._writes: dict[int, HistoryWrite] = {}
        """By segment, those that no rank has yet."""
        self._fresh: set[int] = set()
        """Slots taken since the last plan."""
        self._changed = set(range(num_slots))
        """Slots whose row in the table is to be compared with what was sent."""

    def enter(self, slot: int, key: bytes) -> None:
        """A sequence takes `slot` in the plan being made. key: of its prompt and salt; sequences
        with equal keys draft from each other."""
        assert slot not in self._keys, f"slot {slot} is taken"
        self._keys[slot] = key
        self._fresh.add(slot)
        family = self._families.setdefault(key, _Family())
        for source in self._first_sources(family):
            self._give(slot, source)
        for other in list(family.open):
            self._give(other, slot)
        family.live[slot] = None
        if len(self._rows[slot]) < self._num_sources:
            family.open[slot] = None

    def leave(self, slot: int, *, prompt_len: int, size: int, version: int, keep: bool) -> None:
        """A sequence leaves `slot` with `size` tokens, `prompt_len` of them its prompt.

        version: of the weights that sampled its last token. keep: others may draft from it later;
        not so if its tokens are worthless, or if it comes back.
        """
        key = self._keys.pop(slot)
        family = self._families[key]
        del family.live[slot]
        family.open.pop(slot, None)
        for source in self._rows[slot]:
            self._readers[source].discard(slot)
        self._rows[slot].clear()
        self._changed.add(slot)
        # What entered since the last plan is not on the ranks yet.
        keep = keep and size > prompt_len and slot not in self._fresh and self._recent(version)
        self._fresh.discard(slot)
        by = self._write(slot, key, prompt_len, size, version) if keep else _NONE
        self._replace(slot, by)
        if keep:
            for other in list(family.open):
                self._give(other, by)
        self._forget_if_empty(key)

    def take(self) -> DraftSources | None:
        """What changed since the last call, for the plan being made; None if nothing did."""
        self._fresh.clear()
        if not self._changed and not self._writes:
            return None
        slots = np.fromiter(sorted(self._changed), np.int32, len(self._changed))
        wanted = np.full((len(slots), self._num_sources), _NONE, np.int32)
        for at, slot in enumerate(slots.tolist()):
            row = self._rows[slot]
            wanted[at, : len(row)] = row
        rows, columns = np.nonzero(self._sent[slots] != wanted)
        self._sent[slots] = wanted
        writes = list(self._writes.values())
        self._changed.clear()
        self._writes = {}
        if not len(rows) and not writes:
            return None
        return DraftSources(
            writes=writes,
            slots=slots[rows],
            columns=columns.astype(np.int32),
            ids=wanted[rows, columns],
        )

    def set_version(self, version: int) -> None:
        """Weights `version` serve from now on; texts of versions long gone are dropped."""
        if version in self._versions:
            self._versions.remove(version)
        self._versions.append(version)
        for segment in self._segments.not_of(frozenset(self._versions)):
            self._segments.drop(segment)
            self._dropped(segment)

    def check_integrity(self, slots: set[int]) -> None:
        """Assert that `slots` are those in use, that each source of one is a running sequence or a
        segment of its prompt, and that both sides of every relation agree."""
        assert set(self._keys) == slots, "slots in use differ"
        for slot, row in enumerate(self._rows):
            assert not row or slot in self._keys, f"slot {slot} is free and has sources"
            assert len(set(row)) == len(row) <= self._num_sources, f"sources of {slot}: {row}"
            for source in row:
                assert source != slot, f"slot {slot} drafts from itself"
                assert self._key_of(source) == self._keys[slot], f"{source} is of another prompt"
                assert slot in self._readers[source], f"{source} does not know that {slot} reads"
        count = sum(len(row) for row in self._rows)
        assert count == sum(len(slots) for slots in self._readers.values()), "a reader is lost"
        for key, family in self._families.items():
            assert family.live or family.segments, "a family of nobody"
            assert list(family.live) == [s for s in family.live if self._keys[s] == key]
            room = {s for s in family.live if len(self._rows[s]) < self._num_sources}
            assert set(family.open) == room, "rows with room differ"
        assert sum(len(family.live) for family in self._families.values()) == len(self._keys)

    def _key_of(self, source: int) -> bytes | None:
        if source >= 0:
            return self._keys.get(source)
        return self._segments[-2 - source].key

    def _recent(self, version: int) -> bool:
        if version in self._versions:
            return True
        if len(self._versions) == _NUM_VERSIONS:
            return False
        self._versions.appendleft(version)  # What was served before the first update seen here.
        return True

    def _first_sources(self, family: _Family) -> list[int]:
        """Sources of a row that enters: the latest of each kind."""
        live = list(islice(reversed(family.live), self._num_sources))
        segments = [-2 - s for s in islice(reversed(family.segments), self._num_sources)]
        num_live = min(len(live), max(self._num_sources // 2, self._num_sources - len(segments)))
        return [*live[:num_live], *segments[: self._num_sources - num_live]]

    def _give(self, slot: int, source: int) -> None:
        """Another source for a row, unless it has it or is full."""
        row = self._rows[slot]
        if source in row or source == slot or len(row) >= self._num_sources:
            return
        row.append(source)
        self._readers[source].add(slot)
        self._changed.add(slot)
        if len(row) == self._num_sources:
            self._families[self._keys[slot]].open.pop(slot, None)

    def _replace(self, source: int, by: int) -> None:
        """Nobody may read `source` any more; its readers get `by`, or something else if none."""
        readers = sorted(self._readers[source])
        self._readers[source].clear()
        for slot in readers:
            row = self._rows[slot]
            self._changed.add(slot)
            if by != _NONE:
                row[row.index(source)] = by
                self._readers[by].add(slot)
                continue
            row.remove(source)
            family = self._families[self._keys[slot]]
            family.open[slot] = None
            self._refill(slot, family)

    def _refill(self, slot: int, family: _Family) -> None:
        """Give a row that lost a source the latest of the others, if there are any."""
        segments = (-2 - number for number in reversed(family.segments))
        # The row has fewer than `num_sources` of them, and itself, so this many bring a new one.
        for source in islice(chain(segments, reversed(family.live)), self._num_sources + 1):
            self._give(slot, source)

    def _write(self, slot: int, key: bytes, prompt_len: int, size: int, version: int) -> int:
        """The outputs of the sequence that leaves become a segment; its number as a source."""
        start = max(0, prompt_len - _PROMPT_TOKENS, size - self._segments.longest)
        segment, dropped = self._segments.add(size - start, key, version)
        for old in dropped:
            self._dropped(old)
        self._families.setdefault(key, _Family()).segments[segment.number] = None
        self._readers[-2 - segment.number] = set()
        self._writes[segment.number] = HistoryWrite(slot, start, size, segment.number, segment.at)
        return -2 - segment.number

    def _dropped(self, segment: Segment) -> None:
        """Segments that are gone leave every table, and are not written if they were not yet."""
        self._writes.pop(segment.number, None)
        family = self._families[segment.key]
        del family.segments[segment.number]
        self._replace(-2 - segment.number, _NONE)
        del self._readers[-2 - segment.number]
        self._forget_if_empty(segment.key)

    def _forget_if_empty(self, key: bytes) -> None:
        family = self._families.get(key)
        if family is not None and not family.live and not family.segments:
            del self._families[key]
