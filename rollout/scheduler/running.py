"""The running sequences: slots, their pages, and how a sequence enters and leaves."""

from __future__ import annotations

import numpy as np

from engine.protocol import IntArray
from rollout.cache.idle_kv import IdleKv
from rollout.cache.manager import CacheManager
from rollout.cache.radix_node import Match
from rollout.scheduler.routes.reads import RouteReads
from rollout.scheduler.sequence import Sequence
from rollout.scheduler.speculative.drafts import Drafts
from rollout.scheduler.table import DECODING, PREFILLING, SlotTable


class RunningSet:
    """Owns the slot table; every page a sequence holds is taken and given back here."""

    def __init__(
        self,
        table: SlotTable,
        cache: CacheManager,
        version: int,
        drafts: Drafts | None,
        routes: RouteReads,
    ) -> None:
        """drafts: told who comes and goes; None where nothing is drafted. routes: reads those of
        sequences that leave their pages."""
        self.table = table
        self.cache = cache
        self.version = version
        self.drafts = drafts
        self.routes = routes
        self.prefilling: dict[int, Sequence] = {}
        """By slot, oldest admission first."""
        self._by_slot: dict[int, Sequence] = {}
        self._free_slots = list(range(table.num_slots - 1, -1, -1))
        self._decode_slots: IntArray | None = None

    def __len__(self) -> int:
        return len(self._by_slot)

    def __getitem__(self, slot: int) -> Sequence:
        return self._by_slot[slot]

    @property
    def num_free_slots(self) -> int:
        """Slots a new sequence may take."""
        return len(self._free_slots)

    def sequences(self) -> list[Sequence]:
        """Every running sequence, in order of arrival."""
        return sorted(self._by_slot.values(), key=lambda sequence: sequence.arrival)

    def slots(self) -> IntArray:
        """Slots in use, int32, in no particular order."""
        return np.fromiter(self._by_slot, np.int32, len(self._by_slot))

    def decode_slots(self) -> IntArray:
        """Slots past their prefill, int32, in batch order; the same array until that
        changes."""
        if self._decode_slots is None:
            slots = np.flatnonzero(self.table.phase == DECODING).astype(np.int32)
            self._decode_slots = self.in_batch_order(slots)
        return self._decode_slots

    def in_batch_order(self, slots: IntArray) -> IntArray:
        """`slots` sorted so that the samples of a group are adjacent."""
        order = self.batch_order(slots)
        result: IntArray = slots[order]
        return result

    def batch_order(self, slots: IntArray) -> IntArray:
        """The permutation that `in_batch_order` applies."""
        keys = (self.table.arrival[slots], self.table.group_order[slots])
        return np.lexsort(keys).astype(np.int32)

    def start_turn(self, sequence: Sequence, held: IdleKv) -> int:
        """`start` of a session's next turn, with the KV that the session held."""
        slot = self.start(sequence, None)
        sequence.node, sequence.pure = held.node, held.pure
        sequence.kv_spans, sequence.kv_end = list(held.spans), len(held.tokens)
        self.table.add_pages(slot, held.pages)
        self.table.num_computed[slot] = len(held.tokens)
        return slot

    def start(self, sequence: Sequence, match: Match | None) -> int:
        """Give a waiting sequence a slot and the pages it shares; returns the slot."""
        slot = self._free_slots.pop()
        kv_tokens = self.cache.num_pages * self.cache.page_size
        self.table.load(slot, sequence, kv_tokens)
        sequence.slot, sequence.pure = slot, True
        sequence.drop_kv()
        if match is not None:
            sequence.node = match.node
            self.table.add_pages(slot, match.pages)
            self.table.num_computed[slot] = match.num_tokens
        self._by_slot[slot] = sequence
        self.prefilling[slot] = sequence
        if self.drafts is not None:
            self.drafts.entered(sequence)
        return slot

    def finish_prefill(self, sequence: Sequence) -> None:
        """Its whole prompt is planned; it decodes from the next plan on."""
        self.table.phase[sequence.slot] = DECODING
        del self.prefilling[sequence.slot]
        self._decode_slots = None

    def share(self, sequence: Sequence, num_tokens: int, step: int) -> None:
        """Let others use the first `num_tokens` tokens, whose KV `step` completes."""
        if not sequence.pure:
            return
        slot = sequence.slot
        sequence.node = self.cache.commit(
            self.table.tokens[slot, :num_tokens],
            self.table.pages(slot)[: self.cache.pages_for(num_tokens)],
            sequence.node,
            version=self.version,
            salt=sequence.request.salt,
            step=step,
        )

    def stop(
        self, sequence: Sequence, *, step: int, keep_kv: bool = True, comes_back: bool = False
    ) -> None:
        """Take a sequence out of its slot; its tokens and logprobs stay with it.

        step: the step being planned, or the next one. keep_kv: leave what it computed to
        the prefix cache, and, unless it comes back, its text to draft from.
        """
        slot, table = sequence.slot, self.table
        computed = self._take_results(sequence)
        if not comes_back or len(sequence.tokens) > table.target[slot]:
            self.routes.leave(sequence, table.pages(slot), computed)
        keep = keep_kv and sequence.pure
        if sequence.request.session and keep_kv and not comes_back:
            self._hold(sequence, computed, step - 1)
        else:
            self.cache.release(
                table.pages(slot),
                sequence.node,
                tokens=sequence.tokens[:computed] if keep else None,
                version=self.version,
                salt=sequence.request.salt,
                step=step - 1,
            )
        table.clear(slot)
        self._free_slot(sequence, keep_drafts=keep_kv and not comes_back)

    def _hold(self, sequence: Sequence, computed: int, step: int) -> None:
        """Hand the KV of a turn that ended, completed by `step`, over to its session."""
        request = sequence.request
        self.cache.hold(
            request.session,
            sequence.tokens[:computed],
            self.table.pages(sequence.slot),
            sequence.node,
            spans=sequence.kv_spans_before(computed),
            kv_policy=request.kv_policy,
            pure=sequence.pure,
            version=self.version,
            salt=request.salt,
            step=step,
        )

    def stop_broken(self, sequence: Sequence, *, step: int) -> None:
        """As `stop` for a sequence whose logits were not finite: what it computed, and the cached
        prefix it went on from, are of no use to others and leave the prefix cache."""
        self.cache.distrust(sequence.node)
        self.stop(sequence, step=step, keep_kv=False)

    def stop_many(self, sequences: list[Sequence]) -> None:
        """As `stop` for each of `sequences`, leaving nothing to the prefix cache."""
        for sequence in sequences:
            computed = self._take_results(sequence)
            self.routes.leave(sequence, self.table.pages(sequence.slot), computed)
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        pages = [self.table.pages(slot) for slot in slots.tolist()]
        self.cache.release_many(pages, [sequence.node for sequence in sequences])
        self.table.clear(slots)
        for sequence in sequences:
            self._free_slot(sequence, keep_drafts=False)

    def set_version(self, version: int) -> None:
        """New weights serve: running sequences go on, but their KV is no longer shared."""
        for slot, sequence in self._by_slot.items():
            computed = int(self.table.num_computed[slot])
            sequence.close_kv(computed, self.version)
            sequence.pure = sequence.pure and computed == 0
        self.version = version
        self.cache.idle.set_version()
        self.cache.clear()
        if self.drafts is not None:
            self.drafts.set_version(version)

    def take_emitted(self, sequence: Sequence) -> None:
        """Copy what the table knows of outputs that a stream returned into it: the next one is not
        as those before."""
        emitted = int(self.table.emitted[sequence.slot])
        if emitted:
            sequence.num_emitted = emitted - sequence.prompt_len
            self.table.emitted[sequence.slot] = 0

    def take_results(self, sequences: list[Sequence]) -> None:
        """Copy what the table knows of those of `sequences` that run into them, whatever state
        a call that broke off has left the rest in."""
        for sequence in sequences:
            if self._by_slot.get(sequence.slot) is sequence:
                self._take_results(sequence)

    def _take_results(self, sequence: Sequence) -> int:
        """Copy what the table knows of a sequence into it; returns its tokens with KV."""
        slot, table = sequence.slot, self.table
        size = int(table.num_tokens[slot])
        sequence.tokens = table.tokens[slot, :size].copy()
        sequence.logprobs = table.logprobs[slot, sequence.prompt_len : size].copy()
        if sequence.request.entropy:
            sequence.entropies = table.entropies[slot, sequence.prompt_len : size].copy()
        sequence.spec = add_spec(sequence.spec, table.spec[slot])
        self.take_emitted(sequence)
        computed = min(int(table.num_computed[slot] - table.num_unsure[slot]), size)
        sequence.close_kv(computed, self.version)
        return computed

    def _free_slot(self, sequence: Sequence, *, keep_drafts: bool) -> None:
        slot = sequence.slot
        if self.drafts is not None:
            self.drafts.left(sequence, self.version, keep=keep_drafts)
        del self._by_slot[slot]
        self.prefilling.pop(slot, None)
        self._free_slots.append(slot)
        self._decode_slots = None
        sequence.slot, sequence.node = -1, None

    def check_integrity(self) -> None:
        """Assert that slots, phases and page counts agree, and the cache with them."""
        table = self.table
        assert len(self._by_slot) + len(self._free_slots) == table.num_slots, "a slot is lost"
        assert set(self._by_slot) == set(np.flatnonzero(table.phase).tolist()), "phase differs"
        prefilling = set(np.flatnonzero(table.phase == PREFILLING).tolist())
        assert set(self.prefilling) == prefilling, "prefilling sequences differ"
        for slot, sequence in self._by_slot.items():
            assert sequence.slot == slot, f"slot {slot} holds a sequence of {sequence.slot}"
            held = int(table.num_pages[slot])
            need = self.cache.pages_for(int(table.num_computed[slot]))
            # Pages that rejected drafts took stay, for the tokens that come in their place.
            spare = self.cache.pages_for(2 * int(table.most_drafts[slot]))
            assert need <= held <= need + spare, (
                f"slot {slot} holds {held} pages, its KV takes {need}"
            )
            if self.drafts is not None:
                self.drafts.check_integrity(slot)
        if self.drafts is not None:
            self.drafts.check_sources(set(self._by_slot))
        self.cache.check_integrity([table.pages(slot) for slot in self._by_slot])


def add_spec(before: tuple[int, int, int], stay: IntArray) -> tuple[int, int, int]:
    """The counts of earlier stays in a slot and of this one."""
    verifies, drafted, accepted = stay.tolist()
    return before[0] + verifies, before[1] + drafted, before[2] + accepted
