"""Takes in what a step sampled: tokens and logprobs appended, ends noticed.

Legend: S rows, K tokens a row at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.protocol import (
    FloatArray,
    IntArray,
    PromptEmbedding,
    PromptLogprobs,
    StepResult,
    TopLogprobs,
)
from rollout.booleans import BoolArray, every, some
from rollout.scheduler.planning.in_flight import InFlight
from rollout.scheduler.running import RunningSet


@dataclass(frozen=True)
class Appended:
    """What `append` did, in row order. Arrays are int32.

    ended: slots whose sequence is over; matched: for each, its stop token or -1.
    streaming: slots that go on and want their outputs now.
    broken: slots whose numbers were not finite; what was sampled before was appended to them.
    num_tokens: tokens appended.
    spec: rows that verified drafts, tokens drafted for them, and accepted of these.
    """

    ended: IntArray
    matched: IntArray
    streaming: IntArray
    broken: list[int]
    num_tokens: int
    spec: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class _Rows:
    """The part of a step's result that is appended: S rows, arrays by row.

    ids, logprobs, entropies: [S, K]; the first `counts` (int32 [S]) of a row are its tokens.
    top, top_slots: the alternatives of those rows that asked, and their slots.
    """

    slots: IntArray
    counts: IntArray
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
            counts=self.counts[keep],
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
        broken |= self._collect_embeddings(flight, result.embeddings)
        rows, table = _rows(flight, result), self._running.table
        alive = table.uid[rows.slots] == flight.uids
        if not every(alive):
            rows = rows.where(alive)
        if broken:
            rows = rows.where(~np.isin(rows.slots, list(broken)))
        begin = table.num_tokens[rows.slots]
        room = table.max_tokens[rows.slots] - begin
        kept, matched = self._kept(rows, begin, room)
        finite = self._num_finite(rows)
        if finite is not None and some(not_finite := finite < kept):
            kept = np.minimum(kept, finite)
            broken |= set(rows.slots[not_finite].tolist())
            # A row that breaks has less than it may have, so that it does not end either way.
            matched = np.where(not_finite, -1, matched)
        self._write(rows, begin, kept, flight.version)
        spec = (0, 0, 0)
        if flight.draft_lens is not None:
            spec = self._count(flight, result, alive)
        ended = (matched >= 0) | (kept >= room)
        streaming = table.stream[rows.slots]
        if some(streaming):
            streaming &= ~ended & (kept > 0) & (begin + kept >= table.emit_at[rows.slots])
            if broken:
                streaming &= ~np.isin(rows.slots, list(broken))
        return Appended(
            ended=rows.slots[ended],
            matched=matched[ended],
            streaming=rows.slots[streaming],
            broken=sorted(broken),
            num_tokens=int(np.add.reduce(kept)),
            spec=spec,
        )

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

    def _kept(self, rows: _Rows, begin: IntArray, room: IntArray) -> tuple[IntArray, IntArray]:
        """How many of its tokens each row keeps, and the stop token it ends with or -1: up to the
        first stop token beyond its minimum, and no more than it may have. Both int32 [S]. begin:
        tokens that each row has. room: those that it may have yet.

        A rank goes on behind a stop token, which it does not know of; it never exceeds the limit.
        """
        table = self._running.table
        kept: IntArray = np.minimum(rows.counts, room)
        matched = np.full(len(kept), -1, np.int32)
        for column in range(rows.ids.shape[1]):
            ids = rows.ids[:, column]
            stopped = table.is_stop(rows.slots, ids)
            if not some(stopped):
                continue
            stopped &= column >= table.min_tokens[rows.slots] - begin
            stopped &= (matched < 0) & (column < kept)
            matched = np.where(stopped, ids, matched)
            kept = np.where(stopped, column + 1, kept)
        return kept, matched

    def _num_finite(self, rows: _Rows) -> IntArray | None:
        """Tokens of each row before the first with a logprob, or an entropy it asked for, that is
        not finite, int32 [S]. None of rows with no such token.

        The logprob of a sampled token is finite exactly where the largest logit of its row is
        and no logit is NaN (`kernels.sampling.sample`). Of the likeliest tokens only NaN is
        wrong: a banned token has -inf.
        """
        width = rows.ids.shape[1]
        finite = np.isfinite(rows.logprobs)
        if rows.entropies is None and rows.top is None and every(finite):
            return None
        first = _first_false(finite)
        if rows.entropies is not None:
            finite = _first_false(np.isfinite(rows.entropies))
            for row in np.flatnonzero(finite < width).tolist():
                if self._running[int(rows.slots[row])].request.entropy:
                    first[row] = min(first[row], finite[row])
        if rows.top is not None:
            places = {slot: row for row, slot in enumerate(rows.slots.tolist())}
            for slot, values in zip(rows.top_slots.tolist(), rows.top.logprobs, strict=True):
                if np.isnan(values[: self._running.table.num_alternatives[slot]]).any():
                    first[places[slot]] = 0
        return first

    def _write(self, rows: _Rows, begin: IntArray, kept: IntArray, version: int) -> None:
        """Append the first `kept` tokens of each row to the `begin` that it has."""
        table, got = self._running.table, kept > 0
        if every(got):
            self._stamp(rows.slots, begin, version)
        else:
            self._stamp(rows.slots[got], begin[got], version)
        if rows.top is not None:
            chosen = np.isin(rows.top_slots, rows.slots[got])
            top = TopLogprobs(rows.top.ids[chosen], rows.top.logprobs[chosen])
            self._collect_top(rows.top_slots[chosen], top)
        for column in range(rows.ids.shape[1]):
            has = column < kept if column else got
            # Most steps bring each row its one token: a view of all costs nothing.
            at: BoolArray | slice = slice(None) if every(has) else has
            slots, position = rows.slots[at], begin[at] + column
            table.tokens[slots, position] = rows.ids[at, column]
            table.logprobs[slots, position] = rows.logprobs[at, column]
            if rows.entropies is not None:
                table.entropies[slots, position] = rows.entropies[at, column]
        table.num_tokens[rows.slots] = begin + kept

    def _count(
        self, flight: InFlight, result: StepResult, alive: BoolArray
    ) -> tuple[int, int, int]:
        """Note what was drafted for the rows that still run, and accepted; as `Appended.spec`."""
        assert result.counts is not None and result.drafted is not None
        slots, drafted = flight.slots[alive], result.drafted[alive]
        accepted = np.maximum(result.counts[alive] - 1, 0)
        counts = np.stack([drafted > 0, drafted, accepted], axis=1)
        self._running.table.spec[slots] += counts
        rows, num_drafted, num_accepted = counts.sum(axis=0).tolist()
        return rows, num_drafted, num_accepted

    def _stamp(self, slots: IntArray, position: IntArray, version: int) -> None:
        """Open a span of `version` for the rows whose last token another one sampled."""
        table = self._running.table
        other = table.version[slots] != version
        if not some(other):
            return
        for slot, size in zip(slots[other].tolist(), position[other].tolist(), strict=True):
            sequence = self._running[slot]
            self._running.take_emitted(sequence)
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

    def _collect_embeddings(self, flight: InFlight, found: list[PromptEmbedding]) -> set[int]:
        """Keep the embeddings of prompts; the slots of rows where one is not finite."""
        broken: set[int] = set()
        for own in found:
            slot = int(flight.row_slots[own.row])
            if self._running.table.uid[slot] != flight.row_uids[own.row]:
                continue
            if np.isfinite(own.values).all():
                self._running[slot].embedding = own.values.copy()
            else:
                broken.add(slot)
        return broken


def _first_false(values: BoolArray) -> IntArray:
    """Of each row of [S, K] the first column that is False, K where none is; int32 [S]."""
    if every(values):
        return np.full(len(values), values.shape[1], np.int32)
    found: IntArray = np.where(values.all(axis=1), values.shape[1], values.argmin(axis=1))
    return found.astype(np.int32)


def _rows(flight: InFlight, result: StepResult) -> _Rows:
    top_slots = flight.slots
    if result.top_rows is not None:
        top_slots = flight.slots[result.top_rows]
    counts, size = result.counts, len(flight.slots)
    if counts is None:
        counts = np.ones(size, np.int32)
    else:
        size = int(counts.sum())
    assert len(counts) == len(flight.slots) and size == len(result.token_ids), (
        f"{len(result.token_ids)} tokens came for {len(flight.slots)} rows"
    )
    return _Rows(
        slots=flight.slots,
        counts=counts,
        ids=_by_row(result.token_ids, counts),
        logprobs=_by_row(result.logprobs, counts),
        entropies=None if result.entropies is None else _by_row(result.entropies, counts),
        top=result.top,
        top_slots=top_slots,
    )


def _by_row(flat: np.ndarray, counts: IntArray) -> np.ndarray:
    """Values of `counts` tokens a row, row after row, as [S, K]; behind a row's own are zeros."""
    width = 1 if len(flat) == 0 else int(np.maximum.reduce(counts))
    if width == 1 and len(flat) == len(counts):
        return flat[:, None]
    table = np.zeros((len(counts), width), flat.dtype)
    table[np.arange(width) < counts[:, None]] = flat
    return table
