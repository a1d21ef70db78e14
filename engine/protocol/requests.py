"""A request on its way to a replica, what may be done to it, and what comes back."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from engine.protocol.grammar import Grammar
from engine.protocol.native import SamplingParams
from engine.protocol.routes import RouteArray
from engine.protocol.types import (
    CacheKey,
    ClientId,
    Count,
    FinishType,
    Float32,
    FloatArray,
    Int32,
    Int64,
    IntArray,
    KvPolicy,
    LogprobLaw,
    Message,
    PauseMode,
    Pooling,
    RequestId,
    RequestIds,
    StopIds,
    StopString,
    Task,
    TokenCount,
    TokenIds,
    Version,
)


class Request(Struct, frozen=True, kw_only=True, tag="request"):
    """One sequence to sample, or to score: ids in, one seed, `sampling.n` already expanded.

    rid: unique id of this sequence.
    prompt_ids: int32 [prompt_len], not empty.
    seed: counter-based random numbers are drawn from (seed, position).
    group: equal for the samples of one prompt; they are kept adjacent in the batch.
    stop_ids: tokens that end the sequence, the model's EOS ids included unless ignore_eos.
    prompt_logprob_start: first prompt position whose logprob is wanted; -1 for none.
    stream: outputs are wanted while it runs, not only at the end. stream_every: the first at once,
        the second at any token, and then one for so many.
    kv_policy: what a weight update does to it while it runs. keep: it goes on with the KV the
        old weights computed, which its output records; recompute: its KV is computed again
        by the new weights, its tokens stay; fresh: it starts again from its prompt, so that
        one version samples all of it (a stream, which cannot take tokens back, ends).
    entropy: the entropy behind every output token is wanted.
    logprob_ids: tokens whose logprobs are wanted at every position that has one, whatever comes
        there; any order, and twice is twice.
    output_ids: int32 [k], output tokens that were sampled before, here or by another engine; None
        to begin. The request enters as a retracted sequence does: draws, penalties, lengths and
        stops are those of a run that was never cut. Outputs begin behind these tokens. If they
        end with a stop token or reach `max_new_tokens`, it ends at once as that run did, cut at
        the first stop token that counts. What advances over output tokens, as masks of a grammar
        do, has to advance over these first.
    hold_at: it ends, with finish type "hold", before the output token of this index; -1 for
        never. Whatever else ends it at the same token comes first. `output_ids` continues it.
    task: generate samples tokens. classify computes the prompt and nothing more, and ends with the
        scores that a sequence classifier gives its last token (`RequestOutput.scores`); what
        speaks of output tokens has to be left at its default, and `sampling` and `seed` are not
        looked at. embed does the same and ends with a hidden state (`RequestOutput.embedding`). A
        sequence classifier does classify alone, any other model the other two; the rest is refused.
    pooling: of a request to embed, which hidden states behind the final norm its embedding is: that
        of the prompt's last token, or the mean of those of all its tokens. A mean takes no cached
        prefix, of which there is KV and no hidden state.
    allowed_token_ids: int32 [k], at least one: only these are ever sampled. None for any. They say
        which tokens may come and not how likely they are; see `logprob_law`.
    grammar: what the text of the output must be; None for any.
    logprob_law: of an output that `allowed_token_ids` or `grammar` restricts, what its logprobs,
        entropies and alternatives speak of. model: the whole vocabulary, as without a
        restriction. masked: the tokens that may come, whose probabilities are divided by their
        sum; others have -inf. Without a restriction the two are the same.
    draft_tokens: most tokens to draft ahead at once, at most the server's own; -1: the server's.
        What is sampled does not depend on it.
    forced_acceptance: a tool of benchmarks, refused by a server that was not told to serve it:
        each draft counts as accepted with this probability, so that the tokens mean nothing.
        Below 0: off.
    session: id of the open session that this is a turn of; "" for none. `prompt_ids` are then the
        tokens behind those that the session has, and the session has both and the output once the
        turn ended by a stop or a length; whatever else ends it leaves the session as it was.
        Refused with SessionBusy while another turn is in progress.
    session_at: go on behind the first so many tokens of the session and forget the rest; -1 for
        behind all.
    return_routed_experts: the routes of its tokens are wanted, prompt and output, with its last
        output (`RequestOutput.routed_experts`), from token `routed_experts_start_len` on. Refused
        by a model without experts, and by an engine that keeps no routes.
    """

    rid: RequestId
    prompt_ids: IntArray
    sampling: SamplingParams
    seed: Int64
    group: RequestId = ""
    stop_ids: StopIds = msgspec.field(default_factory=list)
    priority: Int64 = 0
    salt: CacheKey = ""
    top_logprobs: Int32 = 0
    prompt_logprob_start: Int32 = -1
    stream: bool = False
    stream_every: TokenCount = 1
    kv_policy: KvPolicy = "keep"
    entropy: bool = False
    logprob_ids: TokenIds = msgspec.field(default_factory=list)
    output_ids: IntArray | None = None
    hold_at: Int32 = -1
    task: Task = "generate"
    pooling: Pooling = "last"
    allowed_token_ids: IntArray | None = None
    grammar: Grammar | None = None
    logprob_law: LogprobLaw = "model"
    draft_tokens: Int32 = -1
    forced_acceptance: Float32 = -1.0
    session: ClientId = ""
    session_at: Int32 = -1
    return_routed_experts: bool = False
    routed_experts_start_len: Int32 = 0

    @property
    def num_alternatives(self) -> int:
        """Tokens a position whose logprobs are wanted beside that of the one that came."""
        return self.top_logprobs + len(self.logprob_ids)

    @property
    def masked(self) -> bool:
        """Whether something restricts, token by token, what may be sampled: each of its steps waits
        for a mask (`StepMasks`) before it samples, and nothing is drafted for it."""
        return self.allowed_token_ids is not None or self.grammar is not None


class Abort(Struct, frozen=True, kw_only=True, tag="abort"):
    """End the request `rid`, those of `rids`, those whose id starts with `rid_prefix`, or `all`;
    what they produced comes back as their final `RequestOutput`. An id nobody has is no error.

    `rid_prefix` is for a dialect whose callers ask for it; a server that ends requests by
    itself names their exact ids.
    """

    rid: RequestId = ""
    rid_prefix: RequestId = ""
    all: bool = False
    message: Message = "aborted by the client"
    rids: RequestIds = msgspec.field(default_factory=list)


class Stop(Struct, frozen=True, kw_only=True, tag="stop"):
    """End one request at `num_tokens` output tokens: a stop string was seen in its text. session:
    that of a turn, which is cut there too if the engine has ended it already."""

    rid: RequestId
    num_tokens: Count
    matched: StopString
    session: ClientId = ""


class Pause(Struct, frozen=True, kw_only=True, tag="pause"):
    """Stop stepping. abort: end everything; retract: running requests wait again, their KV
    freed; keep: nothing moves. New requests wait. Idempotent."""

    mode: PauseMode = "keep"


class Resume(Struct, frozen=True, kw_only=True, tag="resume"):
    """Undo `Pause`. Idempotent."""


class FlushCache(Struct, frozen=True, kw_only=True, tag="flush_cache"):
    """Drop every cached prefix. Refused while requests hold pages."""


class FinishReason(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a sequence ended: a stop token or string, its length, an abort, or a hold, after which
    it may be continued (`Request.output_ids`). length: output tokens, of a length or a hold."""

    type: FinishType
    matched: int | str | None = None
    length: Count | None = None
    message: str | None = None
    error: str | None = None
    """Class name of the error for an abort the engine decided on."""
    field: str | None = None
    """What that error is about."""


class VersionSpan(Struct, frozen=True):
    """Output tokens [start, end) were sampled by weights `version`."""

    version: Version
    start: Count
    end: Count


class TopLogprobs(Struct, frozen=True):
    """Logprobs of k tokens of n positions, int32 [n, k] and float32 [n, k]: the likeliest that a
    request asked for (`top_logprobs`), likeliest first, then those it named (`logprob_ids`)."""

    ids: IntArray
    logprobs: FloatArray


class SpecCounts(Struct, frozen=True, kw_only=True):
    """What speculative decoding did for one sequence. verifies: steps that verified drafts of it;
    drafted, accepted: tokens; synthetic: acceptance was forced, so that its tokens mean nothing."""

    verifies: Count = 0
    drafted: Count = 0
    accepted: Count = 0
    synthetic: bool = False


class RequestOutput(Struct, frozen=True, kw_only=True, tag="output"):
    """What a sequence produced: since the last output if it streams, else all of it.

    start: index of the first token of `token_ids` in the whole output, which the request's own
        `output_ids` begin.
    logprobs: float32 [len(token_ids)].
    entropies: float32 [len(token_ids)], nats, of softmax(logits / temperature) over the whole
        vocabulary (temperature 1 where greedy); None unless asked for.
    prompt_logprobs: float32 [prompt_len - start position], in the first output only.
    finish: None while the sequence runs.
    kv_spans: which version computed the KV of tokens [start, end), prompt included, in the
        final output; more than one span says that stale KV was attended to. That of the last
        token is by the version that computed `scores` or `embedding`.
    scores: float32 [num_labels], raw, of a request to classify that ended with them; else None.
    embedding: float32 [hidden_size], of any length, of a request to embed that ended with it; else
        None.
    spec: what was drafted for it so far; None by a server that drafts nothing.
    routed_experts: uint8 or uint16 [tokens - 1 - routed_experts_start, layers, K] of the final
        output where they were asked for: the experts that each token of prompt and output but the
        last was sent to, in the step that sampled the token behind it. Layers without experts have
        zeros. A route that nobody knows is absent (`engine.protocol.routes`). None of a request
        that was refused or whose step failed.
    queue_s: in the final output, seconds that it waited before it was first part of a step; 0.0 if
        it never was.
    """

    rid: str
    start: Count
    token_ids: IntArray
    logprobs: FloatArray
    finish: FinishReason | None = None
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    num_retractions: Count = 0
    num_restarts: Count = 0
    spans: list[VersionSpan] = msgspec.field(default_factory=list)
    kv_spans: list[VersionSpan] = msgspec.field(default_factory=list)
    top: TopLogprobs | None = None
    prompt_logprobs: FloatArray | None = None
    prompt_top: TopLogprobs | None = None
    entropies: FloatArray | None = None
    scores: FloatArray | None = None
    embedding: FloatArray | None = None
    spec: SpecCounts | None = None
    routed_experts: RouteArray | None = None
    routed_experts_start: Count = 0
    queue_s: float = 0.0


class TokenRows(Struct, frozen=True, kw_only=True, tag="token_rows"):
    """The outputs of n streams that got tokens and nothing else, as columns: what one step brings
    each of hundreds of streams travels as a few arrays. `rollout.replica.columns` makes and reads
    it.

    starts, sizes: int32 [n], as `RequestOutput.start` and the length of its `token_ids`.
    versions: int64 [n], of the weights that sampled a row's tokens. token_ids int32 and logprobs
    float32 [sum of sizes], row after row. counts: int32 [4, n], `prompt_tokens`,
    `cached_tokens`, `num_retractions` and `num_restarts`. spec: int32 [4, n], `verifies`,
    `drafted`, `accepted` and `synthetic` of `SpecCounts`, -1 where a row has none; None where no
    row has.
    """

    rids: list[str]
    starts: IntArray
    sizes: IntArray
    versions: np.ndarray[Any, np.dtype[np.int64]]
    token_ids: IntArray
    logprobs: FloatArray
    counts: IntArray
    spec: IntArray | None = None
