"""Draft lengths of the rows that decode, and the bounds they leave on what a row has computed.

How many drafts were accepted is known on the ranks at once and here one step later. So a running
sequence has two counts of tokens whose KV is computed once every planned step is done: the most,
`SlotTable.num_computed`, which its pages have to hold, and the least, that less `num_unsure`,
which may be shared. Both follow from the tokens known and the steps in flight.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol

import numpy as np

from engine.config import SpeculativeConfig
from engine.protocol import DraftSources, IntArray, Request, StepResult
from rollout.cache.manager import CacheManager
from rollout.scheduler.planning.in_flight import InFlight
from rollout.scheduler.sequence import Sequence
from rollout.scheduler.table import PREFILLING, SlotTable


class Controller(Protocol):
    """Says how many drafts a step verifies. Steps come in order, planned and observed; those that
    failed are never observed."""

    def choose(self, num_rows: int) -> int:
        """Most drafts a row for the next step of `num_rows` rows, all of which decode: 0, or so
        many that the step built for them has `MAX_VERIFY_ROWS` rows at most."""
        ...

    def planned(self, step: int, num_rows: int, k: int) -> None:
        """A step in which every row decodes was planned, with `k` drafts a row at most: fewer than
        chosen where pages forbade them or rows are near their end."""
        ...

    def observe(self, step: int, counts: IntArray) -> None:
        """Its result came; int32, a row each: as in `StepResult`, of a plain step ones. Steps that
        `planned` was not told of come too."""
        ...


class History(Protocol):
    """Knows what drafts may be copied from."""

    def enter(self, slot: int, key: bytes) -> None:
        """A sequence took a slot; key: equal for those that may draft from each other."""
        ...

    def leave(self, slot: int, *, prompt_len: int, size: int, version: int, keep: bool) -> None:
        """It left with `size` tokens; keep: others may go on to draft from them."""
        ...

    def take(self) -> DraftSources | None:
        """What changed since the last plan."""
        ...

    def set_version(self, version: int) -> None:
        """New weights serve."""
        ...

    def check_integrity(self, slots: set[int]) -> None:
        """Assert that `slots` are those in use, and none drafts from what it may not."""
        ...


class Drafts:
    """Draft lengths and bounds over one slot table."""

    def __init__(
        self,
        config: SpeculativeConfig,
        table: SlotTable,
        cache: CacheManager,
        *,
        controller: Controller,
        history: History,
    ) -> None:
        self._config = config
        self._table = table
        self._cache = cache
        self._controller = controller
        self._history = history
        self.draft_len = 0
        """Most drafts of a row in the last step in which every row decoded."""

    def entered(self, sequence: Sequence) -> None:
        """A sequence took its slot."""
        most, request = self._config.draft_tokens, sequence.request
        if request.draft_tokens >= 0:
            most = min(most, request.draft_tokens)
        self._table.most_drafts[sequence.slot] = most if sequence.may_draft else 0
        self._history.enter(sequence.slot, _family_key(request))

    def left(self, sequence: Sequence, version: int, *, keep: bool) -> None:
        """A sequence is about to leave its slot, with its tokens taken."""
        self._history.leave(
            sequence.slot,
            prompt_len=sequence.prompt_len,
            size=len(sequence.tokens),
            version=version,
            keep=keep and sequence.request.forced_acceptance < 0,
        )

    def lens(self, slots: IntArray) -> IntArray:
        """How many tokens to draft for each of the rows of a step in which all decode, int32 [R].

        Whoever is near its end drafts no further; so does everyone beyond the pages it has or
        can have without taking one from the prefix cache.
        """
        k = self._controller.choose(len(slots))
        if k == 0:
            return np.zeros(len(slots), np.int32)
        table = self._table
        computed = table.num_computed[slots]
        lens: IntArray = np.minimum(table.most_drafts[slots], k)
        lens = np.minimum(lens, table.max_tokens[slots] - 1 - computed)
        page_size = self._cache.page_size
        missing = -(-(computed + lens) // page_size) - table.num_pages[slots]
        if int(np.maximum(missing, 0).sum()) > self._cache.num_free:
            lens = np.minimum(lens, table.num_pages[slots] * page_size - computed)
        return lens

    def drafted(self, slots: IntArray, lens: IntArray) -> None:
        """These rows may compute so many tokens more in the step being planned."""
        self._table.num_computed[slots] += lens
        self._table.num_unsure[slots] += lens

    def planned(
        self, step: int, slots: IntArray, lens: IntArray | None, *, all_decode: bool
    ) -> None:
        """A step was planned in which `slots` sample, with `lens` drafts each."""
        table = self._table
        table.steps_ahead[slots] += 1
        table.tokens_ahead[slots] += 1 if lens is None else lens + 1
        if all_decode:
            self.draft_len = k = 0 if lens is None else int(lens.max(initial=0))
            self._controller.planned(step, len(slots), k)

    def applied(self, flight: InFlight, result: StepResult) -> None:
        """The result of a step was appended to those of its rows that still run."""
        alive, lens = self._table.uid[flight.slots] == flight.uids, flight.draft_lens
        self._settle(flight.slots[alive], None if lens is None else lens[alive])
        counts = np.ones(len(flight.slots), np.int32) if result.counts is None else result.counts
        self._controller.observe(flight.step, counts)

    def _settle(self, slots: IntArray, lens: IntArray | None) -> None:
        table = self._table
        table.steps_ahead[slots] -= 1
        table.tokens_ahead[slots] -= 1 if lens is None else lens + 1
        if lens is None:
            return
        known, end = table.num_tokens[slots] - 1, table.max_tokens[slots] - 1
        most = np.minimum(known + table.tokens_ahead[slots], end)
        table.num_computed[slots] = most
        table.num_unsure[slots] = most - np.minimum(known + table.steps_ahead[slots], end)

    def sources(self) -> DraftSources | None:
        """What changed of the sources since the last plan."""
        return self._history.take()

    def set_version(self, version: int) -> None:
        """New weights serve."""
        self._history.set_version(version)

    def check_sources(self, slots: set[int]) -> None:
        """Assert that the running sequences, in `slots`, draft from what they may."""
        self._history.check_integrity(slots)

    def check_integrity(self, slot: int) -> None:
        """Assert that what is shared of a running sequence is computed, and what it may compute
        has pages, whatever the steps in flight accept."""
        table = self._table
        unsure, computed = int(table.num_unsure[slot]), int(table.num_computed[slot])
        if table.phase[slot] == PREFILLING:
            assert unsure == 0, f"slot {slot}: a prompt's length is not in doubt"
            return
        known, end = int(table.num_tokens[slot]) - 1, int(table.max_tokens[slot]) - 1
        if known == end:
            return  # It samples nothing: only its prompt was wanted.
        least = min(known + int(table.steps_ahead[slot]), end)
        most = min(known + int(table.tokens_ahead[slot]), end)
        assert computed - unsure == least, f"slot {slot}: {computed - unsure} sure, {least} are"
        assert computed == most, f"slot {slot}: at most {computed} computed, {most} may be"


def _family_key(request: Request) -> bytes:
    """Equal for requests of the same prompt and salt. Digests, since thousands of finished texts
    keep theirs, each of the salt on its own, which may spell the bytes of a prompt."""
    key = blake2b(blake2b(request.salt.encode(), digest_size=16).digest(), digest_size=16)
    key.update(request.prompt_ids.astype(np.int32).tobytes())
    return key.digest()
