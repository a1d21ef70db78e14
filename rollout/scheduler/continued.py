"""Requests that come with output tokens: where those end, and how a sequence begins with them."""

from __future__ import annotations

import msgspec
import numpy as np

from engine.protocol import FinishReason, IntArray, Request
from rollout.scheduler.encode import row_numbers
from rollout.scheduler.routes.kept import kept_routes
from rollout.scheduler.sequence import Sequence


def num_given(request: Request) -> int:
    """Output tokens that came with a request."""
    return 0 if request.output_ids is None else len(request.output_ids)


def given_stop(request: Request) -> int:
    """Index of the first of a request's output tokens that is a stop token beyond the minimum, as
    a run that was never cut would have noticed; -1 if there is none."""
    ids, least = request.output_ids, request.sampling.min_new_tokens
    if ids is None or not request.stop_ids:
        return -1
    found = np.flatnonzero(np.isin(ids[least:], request.stop_ids))
    return least + int(found[0]) if len(found) else -1


def shown_given(request: Request) -> list[int]:
    """The output tokens that came with a request as its text is made of them: up to the stop token
    that ends them, which has none unless `no_stop_trim`."""
    if request.output_ids is None:
        return []
    end, stop = len(request.output_ids), given_stop(request)
    if stop >= 0:
        end = stop + request.sampling.no_stop_trim
    ids: list[int] = request.output_ids[:end].tolist()
    return ids


def ended_with(request: Request, num_tokens: int) -> Request:
    """The request as one that is over with the first `num_tokens` of its output tokens, where a
    stop string was found beyond its minimum: the engine answers it at once."""
    assert request.output_ids is not None
    sampling = msgspec.structs.replace(request.sampling, max_new_tokens=num_tokens)
    return msgspec.structs.replace(
        request, output_ids=request.output_ids[:num_tokens], sampling=sampling
    )


def begin(request: Request, arrival: int, *, context_length: int) -> Sequence:
    """The sequence of a request, which arrives as number `arrival`; nothing is noted yet."""
    sequence = Sequence(
        request=request,
        arrival=arrival,
        group_order=arrival,
        numbers=row_numbers(request, context_length - len(request.prompt_ids)),
        tokens=request.prompt_ids.astype(np.int32),
        routes=kept_routes(request),
    )
    if request.output_ids is not None:
        give(sequence, request.output_ids)
    return sequence


def give(sequence: Sequence, output_ids: IntArray) -> None:
    """Let a new sequence begin with `output_ids` (int32 [k]), as one that was retracted does, and
    note why it is over with them, if it is.

    They are taken to be returned already. Their logprobs and versions are known to whoever sent
    them; here they are NaN and no span.
    """
    stop = given_stop(sequence.request)
    if stop >= 0:
        output_ids = output_ids[: stop + 1]
        sequence.ended = FinishReason(type="stop", matched=int(output_ids[stop]))
    elif len(output_ids) >= sequence.max_new_tokens:
        sequence.ended = FinishReason(type="length", length=len(output_ids))
    sequence.tokens = np.concatenate((sequence.tokens, output_ids.astype(np.int32)))
    sequence.num_given = sequence.num_emitted = sequence.span_start = len(output_ids)
    sequence.logprobs = np.full(len(output_ids), np.nan, np.float32)
    if sequence.request.entropy:
        sequence.entropies = sequence.logprobs.copy()
