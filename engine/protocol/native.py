"""The wire: SGLang's native `/generate`, as typed structs."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from engine.protocol.grammar import Grammar
from engine.protocol.routes import RouteDType
from engine.protocol.types import (
    AllowedIds,
    ClientId,
    Count,
    Float32,
    GrammarSource,
    Int32,
    Int64,
    KvPolicy,
    LogitBias,
    LogprobLaw,
    OutputIds,
    Penalty,
    Salt,
    Seconds,
    StopString,
    StopStrings,
    TokenIds,
)


class SamplingParams(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How one request is sampled; names and defaults of SGLang's native API.

    `temperature` below 1e-6 is greedy (its logprobs are at temperature 1). `top_k` -1 is
    off. Penalties and `logit_bias` change the logits before temperature, so the returned
    logprob is that of the changed distribution; `top_k`, `top_p` and `min_p` only restrict
    which tokens may be drawn and do not renormalise the logprob (DESIGN, decision 9).
    `min_new_tokens`: no stop token can be drawn before so many tokens were, and no stop string
    counts that one of them completes. `json_schema`, `regex`, `ebnf` and `structural_tag`: at most
    one, the source of a `Grammar` of that kind; `json_schema` "$$ANY$$" is any object.
    """

    max_new_tokens: Int32 = 128
    min_new_tokens: Int32 = 0
    temperature: Float32 = 1.0
    top_p: Float32 = 1.0
    top_k: Int32 = -1
    min_p: Float32 = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Float32 = 1.0
    logit_bias: LogitBias = {}
    stop: StopString | StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    n: Int32 = 1
    sampling_seed: Int64 | None = None
    json_schema: GrammarSource | None = None
    regex: GrammarSource | None = None
    ebnf: GrammarSource | None = None
    structural_tag: GrammarSource | None = None


class GenerateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One native `/generate` object: exactly one of `text` and `input_ids`.

    `logprob_start_len` >= 0 asks for the logprobs of prompt tokens from that position
    (position 0 has none: nothing comes before it). `return_entropy` asks for the entropy of
    the distribution that each output token was drawn from, filters aside. Among the
    `top_logprobs_num` likeliest, a token that cannot come has -9999.0 (its logprob is -inf, which
    JSON cannot write); so has one of `token_ids_logprob`, the tokens whose logprobs are returned at
    every position, whatever came there. `cache_salt` and
    `extra_key` keep the prefix cache of callers apart. Samples of `n` > 1 get seeds derived
    from one seed.

    `output_ids` continues a reply: the output tokens it had, of `n` > 1 samples a list each, in
    the order of their index. With the fields of the first request, and its `sampling_seed`, the
    reply goes on as if it had not been cut. `hold_at` ends it before the output token of that
    index, counted from the first of all, with the finish reason "hold"; -1 for never.

    `allowed_token_ids`: only these tokens are ever sampled, stop tokens no more than others; at
    least one. `grammar`: what the text must be, in the place of the four of `sampling_params`.
    `logprob_law`: where either is set, logprobs, entropies and likeliest tokens are the model's
    over the whole vocabulary, or with "masked" those of the draw among what may come; the reply
    says which.

    `draft_tokens`: most tokens that are drafted ahead at once, at most the server's own number; -1
    takes that. What is sampled does not depend on it. `forced_acceptance`, in [0, 1], is the
    probability with which each draft counts as accepted, whatever the model says: the tokens mean
    nothing, so a server has to be told to serve it. -1 for off.

    `session`: the id of an open session (POST /sessions), whose tokens come before this prompt.
    `session_at`: behind the first so many of them, the rest being forgotten; -1 for all.

    `return_routed_experts`: the experts that every token but the last was sent to, prompt and
    output (of a turn, the tokens of its session too), from token `routed_experts_start_len` on: in
    `meta_info`, base64 of `routed_experts_dtype` numbers [tokens - 1 - start, layers, experts of a
    token]. Layers without experts have zeros; a route that is not known has -1, or the largest
    number of an unsigned dtype.

    `timeout_s`: seconds from its arrival at a server, after which it ends with the tokens that it
    has, by the finish reason "abort"; null for the server's own limit.
    """

    text: str | None = None
    input_ids: list[Int32] | None = None
    sampling_params: SamplingParams = SamplingParams()
    rid: ClientId | None = None
    return_logprob: bool = False
    logprob_start_len: Int32 = -1
    top_logprobs_num: Int32 = 0
    token_ids_logprob: TokenIds | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    return_entropy: bool = False
    stream: bool = False
    priority: Int64 = 0
    cache_salt: Salt = ""
    extra_key: Salt = ""
    kv_policy: KvPolicy = "keep"
    output_ids: OutputIds | None = None
    hold_at: Int32 = -1
    allowed_token_ids: AllowedIds | None = None
    grammar: Grammar | None = None
    logprob_law: LogprobLaw = "model"
    draft_tokens: Int32 = -1
    forced_acceptance: Float32 = -1.0
    session: ClientId = ""
    session_at: Int32 = -1
    return_routed_experts: bool = False
    routed_experts_start_len: Int32 = 0
    routed_experts_dtype: RouteDType = "int32"
    timeout_s: Seconds | None = None


class ClassifyRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One object of SGLang's `/classify`: exactly one of `text` and `input_ids`, or a batch of
    either; a sequence classifier scores each. Fields as in `GenerateRequest`.

    `model`: taken and not looked at, since one model is served.
    """

    text: str | None = None
    input_ids: list[Int32] | None = None
    rid: ClientId | None = None
    model: str | None = None
    priority: Int64 = 0
    cache_salt: Salt = ""
    extra_key: Salt = ""
    kv_policy: KvPolicy = "keep"


class GenerateResponse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One native `/generate` reply. `rollout/requests/respond.py` fills `meta_info`. What came with
    the request as its `output_ids` is not in it: `rollout/requests/parts.py` joins replies."""

    text: str | None = None
    output_ids: list[int] = msgspec.field(default_factory=list)
    meta_info: dict[str, Any] = msgspec.field(default_factory=dict)
    prompt_token_ids: list[int] | None = None
    index: Count | None = None
