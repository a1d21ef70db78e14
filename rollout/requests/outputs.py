"""Outputs of requests, gathered: chunks of a stream into one, errors into a finish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from engine.errors import SlipstreamError
from engine.protocol import (
    FinishReason,
    FloatArray,
    IntArray,
    Request,
    RequestOutput,
    RouteArray,
    TopLogprobs,
)
from rollout.requests.version_spans import clip_spans, join_spans
from rollout.scheduler.continued import ended_with, shown_given
from rollout.text.detokenizer import Detokenizer, StopMatch, trim_stop_token

_MAX_CHUNKS = 64
"""Outputs of a stream that are kept one by one; an object a token would be most of its memory."""


def refused(request: Request, error: SlipstreamError) -> RequestOutput:
    """The final output of a request that was never queued."""
    finish = _refusal(error)
    start = _num_ids(request.output_ids)
    return _empty(request.rid, finish, _num_ids(request.prompt_ids), start=start)


def refused_id(rid: str, error: SlipstreamError, *, prompt_tokens: int = 0) -> RequestOutput:
    """`refused`, where no more than the id of the request is known."""
    return _empty(rid, _refusal(error), prompt_tokens)


def _refusal(error: SlipstreamError) -> FinishReason:
    return FinishReason(
        type="abort",
        message=error.message,
        error=type(error).__name__,
        field=error.field or None,
    )


def ended_unsent(request: Request, message: str) -> RequestOutput:
    """The final output of a request that was aborted before any engine got it."""
    finish = FinishReason(type="abort", message=message)
    return _empty(
        request.rid, finish, _num_ids(request.prompt_ids), start=_num_ids(request.output_ids)
    )


def _num_ids(ids: IntArray | None) -> int:
    """How many ids there are; 0 for what is no array, which was refused for that: numpy would
    raise for some of it."""
    return ids.size if isinstance(ids, np.ndarray) else 0


def _empty(rid: str, finish: FinishReason, prompt_tokens: int, *, start: int = 0) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        start=start,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        prompt_tokens=prompt_tokens,
        finish=finish,
    )


class Gathered:
    """The outputs of one request, joined and cut at its stop string.

    The engine runs ahead of the text: tokens that come after a match are dropped here,
    and how the engine itself ended the request no longer matters. `stop` is the match, once there
    is one. detokenizer: a new one; None if neither text nor stop strings are wanted. The tokens
    that came with the request, which was found good, may have a stop string already: `request`,
    which is what to send to the engine, ends with it then.
    """

    def __init__(self, request: Request, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self._sampling = request.sampling
        self._detokenizer = detokenizer
        self._chunks: list[RequestOutput] = []
        self.stop: StopMatch | None = None
        if detokenizer is not None and request.output_ids is not None:
            self.stop = detokenizer.feed(shown_given(request)).stop
            if self.stop is not None:
                self.request = ended_with(request, self.stop.num_tokens)

    def add(self, output: RequestOutput) -> StopMatch | None:
        """Take the next output; the stop string it completes, once."""
        self._chunks.append(output)
        if len(self._chunks) >= _MAX_CHUNKS:
            self._chunks = [join_outputs(self._chunks)]
        if self._detokenizer is None or self.stop is not None:
            return None
        visible = trim_stop_token(output.token_ids.tolist(), output.finish, self._sampling)
        self.stop = self._detokenizer.feed(visible).stop
        return self.stop

    def result(self) -> RequestOutput:
        """The whole output, once the last chunk has its finish."""
        whole = join_outputs(self._chunks)
        if self._detokenizer is not None and self.stop is None and not _is_held(whole):
            self.stop = self._detokenizer.finish().stop
        if self.stop is None:
            return whole
        end = self.stop.num_tokens
        finish = FinishReason(type="stop", matched=self.stop.matched)
        whole = msgspec.structs.replace(whole, start=min(whole.start, end), finish=finish)
        return head(whole, end - whole.start)


def _is_held(output: RequestOutput) -> bool:
    """Whether the text goes on: what its last tokens begin may yet be completed."""
    return output.finish is not None and output.finish.type == "hold"


def join_outputs(chunks: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one sequence as one."""
    first, last = chunks[0], chunks[-1]
    if len(chunks) == 1:
        return first
    tops = [chunk.top for chunk in chunks if chunk.top is not None]
    entropies = [chunk.entropies for chunk in chunks if chunk.entropies is not None]
    return msgspec.structs.replace(
        last,
        start=first.start,
        token_ids=np.concatenate([chunk.token_ids for chunk in chunks]),
        logprobs=np.concatenate([chunk.logprobs for chunk in chunks]),
        spans=join_spans(span for chunk in chunks for span in chunk.spans),
        top=_join_tops(tops),
        entropies=np.concatenate(entropies) if entropies else None,
        prompt_logprobs=first.prompt_logprobs,
        prompt_top=first.prompt_top,
        cached_tokens=first.cached_tokens,
    )


def _join_tops(tops: list[TopLogprobs]) -> TopLogprobs | None:
    if not tops:
        return None
    return TopLogprobs(
        ids=np.concatenate([top.ids for top in tops]),
        logprobs=np.concatenate([top.logprobs for top in tops]),
    )


def coalesced(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """One output a sequence, in the order of their first: what came while a reader was busy
    reaches its client in one piece. Nothing is lost or reordered."""
    if len(outputs) == 1:
        return outputs
    by_rid: dict[str, list[RequestOutput]] = {}
    for output in outputs:
        by_rid.setdefault(output.rid, []).append(output)
    return [join_outputs(chunks) for chunks in by_rid.values()]


def head(output: RequestOutput, count: int) -> RequestOutput:
    """The first `count` tokens of an output, with all that comes a token each: the one place
    where outputs are cut."""
    if count >= len(output.token_ids):
        return output
    top, entropies = output.top, output.entropies
    end = output.start + count
    return msgspec.structs.replace(
        output,
        token_ids=output.token_ids[:count],
        logprobs=output.logprobs[:count],
        top=None if top is None else TopLogprobs(top.ids[:count], top.logprobs[:count]),
        entropies=None if entropies is None else entropies[:count],
        spans=clip_spans(output.spans, end),
        kv_spans=clip_spans(output.kv_spans, output.prompt_tokens + end),
        routed_experts=_routes_before(output, output.prompt_tokens + end - 1),
    )


def without_routes(output: RequestOutput) -> RequestOutput:
    """The output as if nobody had asked for its routes."""
    return msgspec.structs.replace(output, routed_experts=None)


def _routes_before(output: RequestOutput, stop: int) -> RouteArray | None:
    """The routes of an output of the positions before `stop`."""
    routes = output.routed_experts
    return None if routes is None else routes[: max(stop - output.routed_experts_start, 0)]


_NO_LOGPROB = float("-inf")
LEAST_LOGPROB = -9999.0
"""What replies show for a token that cannot come, whose logprob is -inf: JSON has no number for
it, and OpenAI's API documents this one."""


def finite_logprobs(values: FloatArray) -> list[Any]:
    """float32 of any shape as lists to encode. -inf, which banned tokens have among the likeliest,
    becomes LEAST_LOGPROB, or the least finite of `values` if that is lower, so that the order
    stays."""
    found: list[Any] = values.tolist()
    if values.ndim == 1 and _NO_LOGPROB not in found:
        # As of every token that was sampled.
        return found
    banned = np.isneginf(values)
    if banned.any():
        least = min(LEAST_LOGPROB, float(values[~banned].min(initial=0.0)))
        found = np.where(banned, np.float32(least), values).tolist()
    return found
