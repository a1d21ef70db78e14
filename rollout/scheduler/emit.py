"""Builds what a sequence returns: pieces of a stream, or all of it at its end."""

from __future__ import annotations

import numpy as np

from engine.protocol import (
    FinishReason,
    FloatArray,
    IntArray,
    RequestOutput,
    SpecCounts,
    TopLogprobs,
)
from rollout.scheduler.sequence import Sequence


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
