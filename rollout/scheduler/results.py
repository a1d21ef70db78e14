"""Takes in what a step sampled: tokens and logprobs appended, ends noticed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.protocol import IntArray, PromptLogprobs, StepResult, TopLogprobs
from rollout.scheduler.plan_builder import InFlight
from rollout.scheduler.running import RunningSet


@dataclass(frozen=True)
class Appended:
    """What `append` did, in row order. Arrays are int32.

    ended: slots whose sequence is over; matched: for each, its stop token or -1.
    streaming: slots that go on and want their outputs now.
    num_tokens: tokens appended.
    """

    ended: IntArray
    matched: IntArray
    streaming: IntArray
    num_tokens: int


class ResultWriter:
    """Writes step results into the slot table."""

    def __init__(self, running: RunningSet) -> None:
        self._running = running

    def append(self, flight: InFlight, result: StepResult) -> Appended:
        """Append each sampled token to its row, unless the row has left since."""
        self._collect_prompt(flight, result.prompt)
        slots, ids, logprobs = flight.slots, result.token_ids, result.logprobs
        assert len(ids) == len(slots), f"{len(ids)} tokens came for {len(slots)} rows"
        top, entropies, table = result.top, result.entropies, self._running.table
        alive = table.uid[slots] == flight.uids
        if not alive.all():
            slots, ids, logprobs = slots[alive], ids[alive], logprobs[alive]
            top = top and TopLogprobs(top.ids[alive], top.logprobs[alive])
            entropies = None if entropies is None else entropies[alive]
        position = table.num_tokens[slots]
        self._stamp(slots, position, flight.version)
        if top is not None:
            self._collect_top(slots, top)
        table.tokens[slots, position] = ids
        table.logprobs[slots, position] = logprobs
        if entropies is not None:
            table.entropies[slots, position] = entropies
        return self._ends(slots, ids, position)

    def scored(self, flight: InFlight) -> list[int]:
        """Slots whose prompt was all there was to compute, and now is."""
        if not flight.scored:
            return []
        uids = dict(zip(flight.row_slots.tolist(), flight.row_uids.tolist(), strict=True))
        return [slot for slot in flight.scored if self._running.table.uid[slot] == uids[slot]]

    def _ends(self, slots: IntArray, ids: IntArray, position: IntArray) -> Appended:
        table = self._running.table
        size = position + 1
        table.num_tokens[slots] = size
        stopped = (table.stop_ids[slots] == ids[:, None]).any(axis=1)
        stopped &= size > table.min_tokens[slots]
        ended = stopped | (size >= table.max_tokens[slots])
        streaming = table.stream[slots] & ~ended
        return Appended(
            ended=slots[ended],
            matched=np.where(stopped, ids, -1)[ended],
            streaming=slots[streaming],
            num_tokens=len(slots),
        )

    def _stamp(self, slots: IntArray, position: IntArray, version: int) -> None:
        """Open a span of `version` for the rows whose last token another one sampled."""
        table = self._running.table
        other = table.version[slots] != version
        if not other.any():
            return
        for slot, size in zip(slots[other].tolist(), position[other].tolist(), strict=True):
            sequence = self._running[slot]
            sequence.close_span(size - sequence.prompt_len, version)
        table.version[slots[other]] = version

    def _collect_top(self, slots: IntArray, top: TopLogprobs) -> None:
        counts = self._running.table.top_logprobs[slots]
        for row in np.flatnonzero(counts).tolist():
            count = int(counts[row])
            self._running[int(slots[row])].top.append(
                (top.ids[row, :count].copy(), top.logprobs[row, :count].copy())
            )

    def _collect_prompt(self, flight: InFlight, parts: list[PromptLogprobs]) -> None:
        for part in parts:
            slot = int(flight.row_slots[part.row])
            if self._running.table.uid[slot] != flight.row_uids[part.row]:
                continue
            sequence = self._running[slot]
            assert part.start == sequence.prompt_logprob_start, (
                f"prompt logprobs from {part.start}, expected {sequence.prompt_logprob_start}"
            )
            sequence.prompt_parts.append(part)
