"""One request on its way through the scheduler.

While a sequence runs, its tokens and counters live in the slot table; this object holds what
the steps in between do not need, and everything while it waits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from engine.protocol import (
    FinishReason,
    FloatArray,
    IntArray,
    Pooling,
    PromptLogprobs,
    Request,
    RowSampling,
    TopLogprobs,
    VersionSpan,
)
from rollout.cache.radix_node import Node
from rollout.requests.version_spans import clip_spans
from rollout.scheduler.encode import RowNumbers
from rollout.scheduler.routes.kept import KeptRoutes, kept_routes
from rollout.scheduler.speculative.reasons import why_undrafted

NO_LOGPROBS: FloatArray = np.empty(0, np.float32)


@dataclass(eq=False, kw_only=True)
class Sequence:
    """Owned by the scheduler; `slot` is -1 while it waits.

    arrival: rank among all requests ever added. group_order: arrival of its group's first.
    numbers: what the slot table stores of the request.
    tokens: int32, prompt and outputs as of the last time it entered the queue.
    logprobs: float32, those of the outputs in `tokens`. entropies: the same, if wanted.
    span_start, span_version: the span of output tokens still open; -1 before the first.
    num_given: output tokens that came with the request. ended: why it is over with them, if it is;
        then its prompt may have to be scored, but nothing is sampled.
    num_emitted: output tokens that were returned by a stream, or came with the request.
    kv_spans, kv_end: which version computed the KV of tokens before `kv_end`; that of later
        ones is by the version that serves. Empty while it has no KV.
    scores: float32 [num_labels] of a request to classify, once its prompt is computed.
    embedding: float32 [hidden_size] of a request to embed, likewise.
    spec: steps that verified drafts of it, tokens drafted, tokens accepted; while it runs, in its
        stays before this one.
    routes: those of its tokens that were read; None unless they are wanted.
    added_at: when it came, by `time.monotonic`. queue_s: seconds until it was first admitted to a
        step; 0.0 before. Both are told, and decide nothing.
    """

    request: Request
    arrival: int
    group_order: int
    numbers: RowNumbers
    tokens: IntArray
    logprobs: FloatArray = field(default_factory=lambda: NO_LOGPROBS)
    entropies: FloatArray = field(default_factory=lambda: NO_LOGPROBS)
    slot: int = -1
    node: Node | None = None
    pure: bool = True
    """Whether all its KV was computed by the version that serves."""
    admitted: bool = False
    cached_tokens: int = 0
    num_retractions: int = 0
    num_restarts: int = 0
    num_given: int = 0
    ended: FinishReason | None = None
    num_emitted: int = 0
    spans: list[VersionSpan] = field(default_factory=list)
    span_start: int = 0
    span_version: int = -1
    top: list[tuple[IntArray, FloatArray]] = field(default_factory=list)
    prompt_parts: list[PromptLogprobs] = field(default_factory=list)
    prompt_emitted: bool = False
    kv_spans: list[VersionSpan] = field(default_factory=list)
    kv_end: int = 0
    scores: FloatArray | None = None
    embedding: FloatArray | None = None
    spec: tuple[int, int, int] = (0, 0, 0)
    routes: KeptRoutes | None = None
    added_at: float = field(default_factory=time.monotonic)
    queue_s: float = 0.0

    @property
    def max_new_tokens(self) -> int:
        """As requested, at most what the context leaves."""
        return self.numbers.max_new_tokens

    @property
    def end_at(self) -> int:
        """Output tokens at which it ends, unless it stops before."""
        return self.numbers.end_at if self.ended is None else self.num_given

    @property
    def samples(self) -> bool:
        """Whether the logits of its last known token are wanted: to sample, or as scores."""
        classifies = self.request.task == "classify"
        return self.ended is None and (classifies or self.max_new_tokens > 0)

    @property
    def needs_nothing(self) -> bool:
        """Whether nothing is wanted of the tokens that it came with."""
        return self.request.prompt_logprob_start < 0 and self.routes is None

    @property
    def pooling(self) -> Pooling | None:
        """How its prompt is embedded, if it is."""
        return self.request.pooling if self.request.task == "embed" else None

    @property
    def may_draft(self) -> bool:
        """Whether its tokens can be drawn several at once."""
        return not why_undrafted(self.request)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def prompt_logprob_start(self) -> int:
        """First prompt position whose logprob is still to be computed; -1 for none.

        Position 0 has no logprob: nothing comes before it.
        """
        start = self.request.prompt_logprob_start
        if start < 0:
            return -1
        start = max(start, 1)
        if self.prompt_parts:
            start = self.prompt_parts[-1].start + len(self.prompt_parts[-1].logprobs)
        return start if start < self.prompt_len else -1

    @property
    def match_limit(self) -> int:
        """Most tokens that may come from the cache: logits of the rest are needed, or hidden
        states, which nobody keeps."""
        if self.pooling == "mean":
            return 0
        limit = len(self.tokens) - 1
        start = self.prompt_logprob_start
        return limit if start < 0 else min(limit, start - 1)

    def leave_queue(self) -> None:
        """It is admitted for the first time."""
        self.admitted = True
        self.queue_s = time.monotonic() - self.added_at

    def close_span(self, end: int, version: int) -> None:
        """Output tokens before `end` belong to the open span; later ones to `version`."""
        if end > self.span_start:
            self.spans.append(VersionSpan(self.span_version, self.span_start, end))
        self.span_start, self.span_version = end, version

    def spans_between(self, start: int, end: int) -> list[VersionSpan]:
        """The spans of output tokens [start, end)."""
        open_span = VersionSpan(self.span_version, self.span_start, end)
        return clip_spans([*self.spans, open_span], end, start=start)

    def close_kv(self, end: int, version: int) -> None:
        """The KV of tokens before `end` is there, the part since `kv_end` by `version`."""
        if end > self.kv_end:
            self.kv_spans.append(VersionSpan(version, self.kv_end, end))
            self.kv_end = end

    def drop_kv(self) -> None:
        """Forget which version computed which KV: there is none any more."""
        self.kv_spans, self.kv_end = [], 0

    def kv_spans_before(self, end: int) -> list[VersionSpan]:
        """The KV versions of tokens [0, end), as far as they were computed."""
        return clip_spans(self.kv_spans, end)

    def restarted(self) -> Sequence:
        """The same request with nothing sampled yet; only what was counted is carried over."""
        return Sequence(
            request=self.request,
            arrival=self.arrival,
            group_order=self.group_order,
            numbers=self.numbers,
            tokens=self.tokens[: self.prompt_len],
            admitted=self.admitted,
            cached_tokens=self.cached_tokens,
            num_retractions=self.num_retractions,
            num_restarts=self.num_restarts + 1,
            spec=self.spec,
            routes=kept_routes(self.request),
            added_at=self.added_at,
            queue_s=self.queue_s,
        )

    def top_between(self, start: int, end: int) -> TopLogprobs | None:
        """The alternatives of output tokens [start, end); None if not asked for."""
        count = self.request.num_alternatives
        if count == 0:
            return None
        first = self.num_given
        rows = self.top[max(0, start - first) : max(0, end - first)]
        if not rows:
            return TopLogprobs(np.empty((0, count), np.int32), np.empty((0, count), np.float32))
        return TopLogprobs(np.stack([ids for ids, _ in rows]), np.stack([lps for _, lps in rows]))

    def row_sampling(self) -> RowSampling:
        """What the ranks need to sample this sequence."""
        sampling = self.request.sampling
        return RowSampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            seed=self.request.seed,
            min_new_tokens=sampling.min_new_tokens,
            banned_ids=list(self.request.stop_ids) if sampling.min_new_tokens > 0 else [],
            top_logprobs=self.request.top_logprobs,
            entropy=self.request.entropy,
            logprob_ids=self.request.logprob_ids,
            masked_law=self.request.logprob_law == "masked",
        )
