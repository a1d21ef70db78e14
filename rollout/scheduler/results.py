"""Takes in what a step sampled: tokens and logprobs appended, ends noticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.protocol import FloatArray, IntArray, PromptLogprobs, StepResult, TopLogprobs
from rollout.scheduler.planning.plan_builder import InFlight
from rollout.scheduler.running import RunningSet

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Appended:
    """What `append` did, in row order. Arrays are int32.

    ended: slots whose sequence is over; matched: for each, its stop token or -1.
    streaming: slots that go on and want their outputs now.
    broken: slots whose numbers were not finite; nothing of this step was appended to them.
    num_tokens: tokens appended.
    """

    ended: IntArray
    matched: IntArray
    streaming: IntArray
    broken: list[int]
    num_tokens: int


@dataclass(frozen=True)
class _Rows:
    """The part of a step's result that is appended: S rows, arrays by row.

    top, top_slots: the alternatives of those rows that asked, and their slots.
    """

    slots: IntArray
    ids: IntArray
    logprobs: FloatArray
    entropies: FloatArray | None
    top: TopLogprobs | None
    top_slots: IntArray

    def where(self, keep: BoolArray) -> _Rows:
        """These rows without some."""
        top, top_slots = self.top, self.top_slots
        if top is not None:
            kept = np.isin(top_slots, self.slots[keep])
            top, top_slots = TopLogprobs(top.ids[kept], top.logprobs[kept]), top_slots[kept]
        return _Rows(
            slots=self.slots[keep],
            ids=self.ids[keep],
            logprobs=self.logprobs[keep],
            entropies=None if self.entropies is None else self.entropies[keep],
            top=top,
            top_slots=top_slots,
        )


class ResultWriter:
    """Writes step results into the slot table."""

    def __init__(self, running: RunningSet) -> None:
        self._running = running

    def append(self, flight: InFlight, result: StepResult) -> Appended:
        """Append each sampled token to its row, or keep the row's scores, unless the row has left
        since or its numbers are not finite."""
        if result.scores is not None:
            return self._scores(flight, result.scores)
        broken = self._collect_prompt(flight, result.prompt)
        assert len(result.token_ids) == len(flight.slots), (
            f"{len(result.token_ids)} tokens came for {len(flight.slots)} rows"
        )
        rows, table = _rows(flight, result), self._running.table
        alive = table.uid[rows.slots] == flight.uids
        if not alive.all():
            rows = rows.where(alive)
        broken |= self._broken(rows)
        if broken:
            rows = rows.where(~np.isin(rows.slots, list(broken)))
        position = table.num_tokens[rows.slots]
        self._stamp(rows.slots, position, flight.version)
        if rows.top is not None:
            self._collect_top(rows.top_slots, rows.top)
        table.tokens[rows.slots, position] = rows.ids
        table.logprobs[rows.slots, position] = rows.logprobs
        if rows.entropies is not None:
            table.entropies[rows.slots, position] = rows.entropies
        return self._ends(rows.slots, rows.ids, position, sorted(broken))

    def scored(self, flight: InFlight) -> list[int]:
        """Slots whose prompt was all there was to compute, and now is."""
        if not flight.scored:
            return []
        uids = dict(zip(flight.row_slots.tolist(), flight.row_uids.tolist(), strict=True))
        return [slot for slot in flight.scored if self._running.table.uid[slot] == uids[slot]]

    def _scores(self, flight: InFlight, scores: FloatArray) -> Appended:
        """Keep the scores of each row, which end it. scores: [S, num_labels]."""
        assert len(scores) == len(flight.slots), (
            f"scores of {len(scores)} rows came for {len(flight.slots)}"
        )
        alive = self._running.table.uid[flight.slots] == flight.uids
        slots, scores = flight.slots[alive], scores[alive]
        finite = np.isfinite(scores).all(axis=1)
        for slot, own in zip(slots[finite].tolist(), scores[finite], strict=True):
            self._running[slot].scores = own.copy()
        return Appended(
            ended=slots[finite],
            matched=np.full(int(finite.sum()), -1, np.int32),
            streaming=slots[:0],
            broken=sorted(slots[~finite].tolist()),
            num_tokens=0,
        )

    def _broken(self, rows: _Rows) -> set[int]:
        """Slots of rows with a logprob, or an entropy they asked for, that is not finite.

        The logprob of a sampled token is finite exactly where the largest logit of its row is
        and no logit is NaN (`kernels.sampling.sample`). Of the likeliest tokens only NaN is
        wrong: a banned token has -inf.
        """
        found: set[int] = set()
        finite = np.isfinite(rows.logprobs)
        if not finite.all():
            found |= set(rows.slots[~finite].tolist())
        if rows.entropies is not None and not (finite := np.isfinite(rows.entropies)).all():
            slots = rows.slots[~finite].tolist()
            found |= {slot for slot in slots if self._running[slot].request.entropy}
        if rows.top is not None:
            for slot, values in zip(rows.top_slots.tolist(), rows.top.logprobs, strict=True):
                if np.isnan(values[: self._running.table.num_alternatives[slot]]).any():
                    found.add(slot)
        return found

    def _ends(
        self, slots: IntArray, ids: IntArray, position: IntArray, broken: list[int]
    ) -> Appended:
        table = self._running.table
        size = position + 1
        table.num_tokens[slots] = size
        stopped = table.is_stop(slots, ids)
        stopped &= size > table.min_tokens[slots]
        ended = stopped | (size >= table.max_tokens[slots])
        streaming = table.stream[slots] & ~ended
        return Appended(
            ended=slots[ended],
            matched=np.where(stopped, ids, -1)[ended],
            streaming=slots[streaming],
            broken=broken,
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
        counts = self._running.table.num_alternatives[slots]
        for row in np.flatnonzero(counts).tolist():
            count = int(counts[row])
            self._running[int(slots[row])].top.append(
                (top.ids[row, :count].copy(), top.logprobs[row, :count].copy())
            )

    def _collect_prompt(self, flight: InFlight, parts: list[PromptLogprobs]) -> set[int]:
        """Keep the scores of prompt tokens; the slots of rows where one is not finite."""
        broken: set[int] = set()
        for part in parts:
            slot = int(flight.row_slots[part.row])
            if self._running.table.uid[slot] != flight.row_uids[part.row]:
                continue
            sequence = self._running[slot]
            assert part.start == sequence.prompt_logprob_start, (
                f"prompt logprobs from {part.start}, expected {sequence.prompt_logprob_start}"
            )
            top = part.top
            if not np.isfinite(part.logprobs).all() or (
                top is not None and np.isnan(top.logprobs).any()
            ):
                broken.add(slot)
                continue
            sequence.prompt_parts.append(part)
        return broken


def _rows(flight: InFlight, result: StepResult) -> _Rows:
    top_slots = flight.slots
    if result.top_rows is not None:
        top_slots = flight.slots[result.top_rows]
    return _Rows(
        slots=flight.slots,
        ids=result.token_ids,
        logprobs=result.logprobs,
        entropies=result.entropies,
        top=result.top,
        top_slots=top_slots,
    )
