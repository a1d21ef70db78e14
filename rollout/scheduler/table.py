"""What every step reads and writes of each running sequence: one numpy column per fact.

A steady decode step touches only these arrays, never a Python object per sequence.
The large tables come from `np.zeros`, whose pages the system commits when written.
"""

from __future__ import annotations

import numpy as np

from engine.protocol import IntArray
from rollout.booleans import BoolArray, some
from rollout.scheduler.sequence import Sequence

FREE, PREFILLING, DECODING = 0, 1, 2
STOP_COLUMNS = 8
"""Stop ids of a sequence that are compared for all rows at once. A sequence with more has its
token looked up in a set of its own while it runs, and costs the others nothing."""


class SlotTable:
    """Columns by slot. S slots, C context length, K = `STOP_COLUMNS`.

    phase: FREE, PREFILLING or DECODING.
    uid: int64 [S], a number no other stay in a slot has.
    num_tokens: prompt and outputs known. num_computed: of these, with KV once every planned
        step is done, at most: `num_unsure` fewer at least, where drafts may be rejected.
        target: tokens known at admission, that prefill must compute.
    most_drafts: tokens that may be drafted ahead at once. steps_ahead: planned steps that sample
        and have not come back; tokens_ahead: tokens that these bring at most.
    spec: int32 [S, 3], steps that verified drafts of this stay, tokens drafted, tokens accepted.
    max_tokens: `num_tokens` at which the sequence ends.
    tokens: int32 [S, C]. logprobs: float32 [S, C], by position; those of outputs only.
    entropies: float32 [S, C], as `logprobs`; written only for requests that want them.
    page_table: int32 [S, ceil(C / page_size)]; the first `num_pages` are valid.
    emitted: of a stream whose outputs are columns by now (`emit.py`), tokens of prompt and output
        that it has returned; 0 of every other, whose `Sequence` knows. rids, told: what its
        outputs are called and say beside tokens; told: int32 [S, 4], as `TokenRows.counts`.
    emit_at: `num_tokens` from which a stream that goes on returns what it has. stream_every: tokens
        between two such.
    masked: whether each of its steps waits for a mask, so that nothing can be drafted for it.
    stop_ids: int32 [S, K], padded with -1; empty in the rows of `many_stops`, the sets of
        those sequences that have more than K.
    """

    def __init__(self, num_slots: int, context_length: int, page_size: int) -> None:
        self.num_slots = num_slots
        num_columns = -(-context_length // page_size)
        self.phase = np.zeros(num_slots, np.int8)
        self.uid = np.zeros(num_slots, np.int64)
        self.num_tokens = np.zeros(num_slots, np.int32)
        self.prompt_len = np.zeros(num_slots, np.int32)
        self.num_computed = np.zeros(num_slots, np.int32)
        self.num_unsure = np.zeros(num_slots, np.int32)
        self.most_drafts = np.zeros(num_slots, np.int32)
        self.steps_ahead = np.zeros(num_slots, np.int32)
        self.tokens_ahead = np.zeros(num_slots, np.int32)
        self.spec = np.zeros((num_slots, 3), np.int32)
        self.target = np.zeros(num_slots, np.int32)
        self.max_tokens = np.zeros(num_slots, np.int32)
        self.min_tokens = np.zeros(num_slots, np.int32)
        self.num_pages = np.zeros(num_slots, np.int32)
        self.priority = np.zeros(num_slots, np.int64)
        self.arrival = np.zeros(num_slots, np.int64)
        self.group_order = np.zeros(num_slots, np.int64)
        self.version = np.zeros(num_slots, np.int64)
        self.stream = np.zeros(num_slots, np.bool_)
        self.emitted = np.zeros(num_slots, np.int32)
        self.emit_at = np.zeros(num_slots, np.int64)
        self.stream_every = np.ones(num_slots, np.int64)
        self.rids = np.full(num_slots, "", object)
        self.told = np.zeros((num_slots, 4), np.int32)
        self.num_alternatives = np.zeros(num_slots, np.int32)
        self.masked = np.zeros(num_slots, np.bool_)
        self.stop_ids = np.full((num_slots, STOP_COLUMNS), -1, np.int32)
        self.many_stops: dict[int, frozenset[int]] = {}
        self.tokens = np.zeros((num_slots, context_length), np.int32)
        self.logprobs = np.zeros((num_slots, context_length), np.float32)
        self.entropies = np.zeros((num_slots, context_length), np.float32)
        self.page_table = np.zeros((num_slots, num_columns), np.int32)
        self._next_uid = 1

    def load(self, slot: int, sequence: Sequence, kv_tokens: int) -> None:
        """Put `sequence` into a free slot; kv_tokens: what the whole KV pool holds."""
        request, size, numbers = sequence.request, len(sequence.tokens), sequence.numbers
        prompt_len = sequence.prompt_len
        self.phase[slot] = PREFILLING
        self.uid[slot] = self._next_uid
        self._next_uid += 1
        self.num_tokens[slot] = self.target[slot] = size
        self.prompt_len[slot] = prompt_len
        self.num_computed[slot] = self.num_pages[slot] = 0
        self.num_unsure[slot] = self.most_drafts[slot] = 0
        self.steps_ahead[slot] = self.tokens_ahead[slot] = 0
        self.spec[slot] = 0
        # A token's KV is written one step after it was sampled, so the last needs no room.
        self.max_tokens[slot] = min(prompt_len + sequence.end_at, kv_tokens + 1)
        self.min_tokens[slot] = prompt_len + numbers.min_new_tokens
        self.priority[slot] = numbers.priority
        self.arrival[slot] = sequence.arrival
        self.group_order[slot] = sequence.group_order
        self.version[slot] = sequence.span_version
        self.stream[slot] = request.stream
        self.stream_every[slot] = request.stream_every
        self.emitted[slot] = self.emit_at[slot] = 0
        self.num_alternatives[slot] = numbers.num_alternatives
        self.masked[slot] = request.masked
        self.tokens[slot, :size] = sequence.tokens
        self.logprobs[slot, prompt_len:size] = sequence.logprobs
        if request.entropy:
            self.entropies[slot, prompt_len:size] = sequence.entropies
        self._set_stop_ids(slot, numbers.stop_ids)

    def pages(self, slot: int) -> IntArray:
        """The pages of a slot, int32; a view."""
        return self.page_table[slot, : self.num_pages[slot]]

    def add_pages(self, slot: int, pages: IntArray) -> int:
        """Append pages to a slot; returns the column of the first."""
        column = int(self.num_pages[slot])
        self.page_table[slot, column : column + len(pages)] = pages
        self.num_pages[slot] = column + len(pages)
        return column

    def is_stop(self, slots: IntArray, ids: IntArray) -> BoolArray:
        """Which of the tokens `ids` (int32 [R]) is a stop id of its slot; bool [R]."""
        equal = self.stop_ids[slots] == ids[:, None]
        stopped: BoolArray = equal.any(axis=1) if some(equal) else equal[:, 0]
        if self.many_stops:
            for row in np.flatnonzero(np.isin(slots, list(self.many_stops))).tolist():
                stopped[row] = int(ids[row]) in self.many_stops[int(slots[row])]
        return stopped

    def clear(self, slot: int | IntArray) -> None:
        """Make one slot or several free."""
        if self.many_stops:
            for gone in np.atleast_1d(slot).tolist():
                self.many_stops.pop(gone, None)
        self.phase[slot] = FREE
        self.uid[slot] = 0
        self.num_pages[slot] = 0
        self.stop_ids[slot] = -1
        self.stream[slot] = False
        self.emitted[slot] = 0
        self.num_alternatives[slot] = 0
        self.masked[slot] = False

    def _set_stop_ids(self, slot: int, stop_ids: IntArray) -> None:
        self.stop_ids[slot] = -1
        if len(stop_ids) > STOP_COLUMNS:
            self.many_stops[slot] = frozenset(stop_ids.tolist())
        else:
            self.stop_ids[slot, : len(stop_ids)] = stop_ids
