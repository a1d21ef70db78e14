"""Builds what sequences return: all of one at its end, pieces of one that streams, and columns of
many streams, whose cost is not one by row."""

from __future__ import annotations

import numpy as np

from engine.protocol import (
    FinishReason,
    FloatArray,
    IntArray,
    RequestOutput,
    SpecCounts,
    TokenRows,
    TopLogprobs,
)
from rollout.booleans import every, some
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence

StepOutput = RequestOutput | TokenRows
"""The output of one sequence, or those of many streams that got tokens and nothing else."""


def make_output(
    sequence: Sequence,
    token_ids: IntArray,
    logprobs: FloatArray,
    entropies: FloatArray,
    finish: FinishReason | None,
    *,
    drafts: bool,
    stay: IntArray | None = None,
) -> RequestOutput:
    """The outputs not yet returned, given all of them so far.

    token_ids: int32 [n], logprobs: float32 [n], from the first output token on; entropies:
    float32 [n], not looked at unless the request wants them. Spans are those of the tokens
    returned here, in positions of the whole output. drafts: whether anything is drafted. stay: what
    was drafted in the slot it still holds, as `SlotTable.spec` has it.
    """
    size = len(token_ids)
    start = min(sequence.num_emitted, size)
    with_prompt = not sequence.prompt_emitted
    sequence.num_emitted, sequence.prompt_emitted = size, True
    return RequestOutput(
        rid=sequence.request.rid,
        start=start,
        token_ids=token_ids[start:].copy(),
        logprobs=logprobs[start:].copy(),
        entropies=entropies[start:].copy() if sequence.request.entropy else None,
        finish=finish,
        prompt_tokens=sequence.prompt_len,
        cached_tokens=sequence.cached_tokens,
        num_retractions=sequence.num_retractions,
        num_restarts=sequence.num_restarts,
        spans=sequence.spans_between(start, size),
        kv_spans=[] if finish is None else sequence.kv_spans_before(_num_read(sequence, size)),
        top=sequence.top_between(start, size),
        prompt_logprobs=_prompt_logprobs(sequence) if with_prompt else None,
        prompt_top=_prompt_top(sequence) if with_prompt else None,
        scores=sequence.scores,
        embedding=sequence.embedding,
        spec=spec_counts(sequence, stay) if drafts else None,
        queue_s=0.0 if finish is None else sequence.queue_s,
    )


def spec_counts(sequence: Sequence, stay: IntArray | None) -> SpecCounts:
    """What was drafted for a sequence so far. stay: as in `make_output`."""
    verifies, drafted, accepted = sequence.spec
    if stay is not None:
        verifies, drafted, accepted = (sequence.spec[i] + int(stay[i]) for i in range(3))
    synthetic = sequence.request.forced_acceptance >= 0
    return SpecCounts(verifies=verifies, drafted=drafted, accepted=accepted, synthetic=synthetic)


def final_output(sequence: Sequence, finish: FinishReason, *, drafts: bool) -> RequestOutput:
    """The last output of a sequence that holds no slot (any more). drafts: as in `make_output`."""
    outputs, logprobs = sequence.tokens[sequence.prompt_len :], sequence.logprobs
    return make_output(sequence, outputs, logprobs, sequence.entropies, finish, drafts=drafts)


def _num_read(sequence: Sequence, size: int) -> int:
    """Tokens whose KV made the results, of a sequence with `size` output tokens: scores and an
    embedding are of the last token itself, and no token was sampled with the KV of the last one."""
    whole = sequence.scores is not None or sequence.embedding is not None
    return sequence.prompt_len + (0 if whole else size - 1)


def _prompt_logprobs(sequence: Sequence) -> FloatArray | None:
    """float32, positions [max(prompt_logprob_start, 1), prompt_len); fewer if aborted."""
    if sequence.request.prompt_logprob_start < 0:
        return None
    parts = [part.logprobs for part in sequence.prompt_parts]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _prompt_top(sequence: Sequence) -> TopLogprobs | None:
    count = sequence.request.num_alternatives
    if sequence.request.prompt_logprob_start < 0 or count == 0:
        return None
    parts = [part.top for part in sequence.prompt_parts if part.top is not None]
    if not parts:
        return TopLogprobs(np.empty((0, count), np.int32), np.empty((0, count), np.float32))
    return TopLogprobs(
        np.concatenate([part.ids[:, :count] for part in parts]),
        np.concatenate([part.logprobs[:, :count] for part in parts]),
    )


class StreamOutputs:
    """Makes the outputs of streams that go on.

    The first output of a stream, the first behind a change of weights, and all of one that wants
    more than tokens and logprobs are an object each. From then on the slot table says what the
    stream has returned (`SlotTable.emitted`), and a step touches no object of it.
    """

    def __init__(self, running: RunningSet, *, drafts: bool) -> None:
        """drafts: as in `make_output`; counts of drafts are an object's to say."""
        self._running = running
        self._drafts = drafts

    def outputs(self, slots: IntArray) -> list[StepOutput]:
        """What those streams got that they have not returned yet. slots: int32."""
        if not len(slots):
            return []
        plain = self._running.table.emitted[slots] > 0
        found: list[StepOutput] = [
            self._one(self._running[slot]) for slot in slots[~plain].tolist()
        ]
        return [*found, self._columns(slots[plain])] if some(plain) else found

    def _columns(self, slots: IntArray) -> TokenRows:
        table = self._running.table
        begin, end = table.emitted[slots], table.num_tokens[slots]
        sizes = end - begin
        if every(sizes == 1):
            rows, at = slots, begin
        else:
            rows = np.repeat(slots, sizes)
            first = np.repeat(begin - np.cumsum(sizes) + sizes, sizes)
            at = first + np.arange(len(rows), dtype=np.int32)
        table.emitted[slots] = end
        table.emit_at[slots] = end + table.stream_every[slots]
        return TokenRows(
            rids=table.rids[slots].tolist(),
            starts=begin - table.prompt_len[slots],
            sizes=sizes,
            versions=table.version[slots],
            token_ids=table.tokens[rows, at],
            logprobs=table.logprobs[rows, at],
            counts=np.ascontiguousarray(table.told[slots].T),
        )

    def _one(self, sequence: Sequence) -> RequestOutput:
        table, slot = self._running.table, sequence.slot
        size = int(table.num_tokens[slot])
        outputs = slice(sequence.prompt_len, size)
        output = make_output(
            sequence,
            table.tokens[slot, outputs],
            table.logprobs[slot, outputs],
            table.entropies[slot, outputs],
            None,
            drafts=self._drafts,
            stay=table.spec[slot],
        )
        every = int(table.stream_every[slot])
        # Streams that began at one step take turns, so that no step returns all they have.
        table.emit_at[slot] = size + (every if table.emit_at[slot] else 1 + slot % every)
        if not self._drafts and _is_plain(sequence):
            table.emitted[slot] = size
            table.rids[slot] = output.rid
            table.told[slot] = (
                output.prompt_tokens,
                output.cached_tokens,
                output.num_retractions,
                output.num_restarts,
            )
        return output


def _is_plain(sequence: Sequence) -> bool:
    """Whether outputs of a stream behind the first are tokens and logprobs alone. Those of turns
    are read on their way out."""
    request = sequence.request
    return not (request.num_alternatives or request.entropy or request.session)
