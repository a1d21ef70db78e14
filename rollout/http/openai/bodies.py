"""Bodies of OpenAI's completions and chat, with vLLM's extensions, and what they ask for."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest, KvPolicy, LogprobLaw, SamplingParams
from engine.protocol.types import (
    AllowedIds,
    ClientId,
    Float32,
    Int32,
    Int64,
    LogitBias,
    Message,
    Name,
    Penalty,
    Salt,
    Seconds,
    StopString,
    StopStrings,
    TokenIds,
)
from rollout.http.openai.fields import NATIVE_NAMES, check_fields
from rollout.http.openai.structured import StructuredFields, grammar_of_body
from rollout.requests.json_types import check_depth, decode_json
from rollout.text.chat_template import check_variables

T = TypeVar("T", bound=msgspec.Struct)

_PROMPT_KINDS: dict[bytes, Any] = {b'"': list[str], b"[": list[list[Int32]]}


class StreamOptions(msgspec.Struct):
    """include_usage: a last chunk with the counts of tokens."""

    include_usage: bool = False


class _Common(StructuredFields, kw_only=True):
    """Options of both routes; names and defaults of OpenAI and vLLM."""

    model: Message = ""
    n: Int32 = 1
    temperature: Float32 = 1.0
    top_p: Float32 = 1.0
    top_k: Int32 = -1
    min_p: Float32 = 0.0
    repetition_penalty: Float32 = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Int64 | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Int32 = 0
    max_tokens: Int32 | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: Int32 | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int64 = 0
    cache_salt: Salt | None = None
    request_id: ClientId | None = None
    allowed_token_ids: AllowedIds | None = None
    logprob_law: LogprobLaw = "model"
    kv_policy: KvPolicy = "keep"
    return_routed_experts: bool | None = None
    routed_experts_prompt_start: Int32 | None = None
    timeout_s: Seconds | None = None

    @property
    def wants_routes(self) -> bool:
        """Whether choices are to have `routed_experts`; a start asks for them too."""
        if self.return_routed_experts is None:
            return self.routed_experts_prompt_start is not None
        return self.return_routed_experts


class CompletionBody(_Common, kw_only=True):
    """POST /v1/completions."""

    prompt: msgspec.Raw
    logprobs: Int32 | None = None
    echo: bool | None = False
    add_special_tokens: bool = True
    best_of: Int32 | None = None


class ChatBody(_Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = False
    top_logprobs: Int32 | None = 0
    max_completion_tokens: Int32 | None = None
    add_generation_prompt: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Name | None = None
    separate_reasoning: bool = True
    include_reasoning: bool = True


def parse_openai(data: bytes, kind: type[T]) -> T:
    """The body. Raises InvalidRequest, and UnsupportedOption for an option that is set and that
    this engine does not have (`fields`)."""
    check_fields(decode_json(data or b"{}", dict[str, msgspec.Raw]), kind)
    body: T = decode_json(data or b"{}", kind, strict=False)
    if isinstance(body, StructuredFields):
        for field in StructuredFields.__struct_fields__:
            check_depth(getattr(body, field) or [], field)
    if "messages" in kind.__struct_fields__:
        _check_conversation(body)
    return body


def _check_conversation(body: Any) -> None:
    """Bound what chat templates recurse into, and drop variables that are null. body: `ChatBody`,
    or the body of another route that has `messages`."""
    for field in ("messages", "tools", "tool_choice", "chat_template_kwargs"):
        if field in body.__struct_fields__:
            check_depth(getattr(body, field) or [], field)
    given = body.chat_template_kwargs or {}
    body.chat_template_kwargs = {k: v for k, v in given.items() if v is not None}
    check_variables(body.chat_template_kwargs)


def prompts_of(prompt: msgspec.Raw, field: str = "prompt") -> list[str] | list[list[int]]:
    """The prompts of `prompt`: a text, a list of texts, ids, or a list of lists of ids.

    Raises InvalidRequest (`field`) for anything else.
    """
    start = bytes(memoryview(prompt)[:64]).lstrip()
    if start.startswith(b'"'):
        return [_prompt(prompt, str, field)]
    inner = start[1:].lstrip()[:1]
    if not start.startswith(b"[") or inner == b"]":
        raise InvalidRequest(f"{field} must be text, ids, or a list of either", field=field)
    if inner.isdigit() or inner == b"-":
        return [_prompt(prompt, list[Int32], field)]
    found: list[str] | list[list[int]] = _prompt(prompt, _PROMPT_KINDS.get(inner, list[str]), field)
    return found


def _prompt(prompt: msgspec.Raw, kind: Any, field: str) -> Any:
    try:
        return decode_json(prompt, kind, what=field)
    except InvalidRequest as error:
        raise InvalidRequest(f"{field}: {error.message}", field=field) from error


def _sampling_of(body: CompletionBody | ChatBody, max_tokens: int) -> SamplingParams:
    """The options under their native names; vLLM's `top_k` 0 stands for all tokens."""
    return SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or -1,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        stop=body.stop or None,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        no_stop_trim=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        spaces_between_special_tokens=body.spaces_between_special_tokens,
        n=body.n,
        sampling_seed=body.seed,
    )


def base_request(
    body: CompletionBody | ChatBody, *, max_tokens: int, top_logprobs: int | None, vocab_size: int
) -> GenerateRequest:
    """The native request without its prompt.

    top_logprobs: alternatives wanted for output tokens, -1 all of them; None without logprobs.
    Raises InvalidRequest for more of them, or of the prompt's, than there are tokens: both become
    one number of the native request, which tells them apart no longer.
    """
    scores = body.prompt_logprobs
    name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    for field, count in ((name, top_logprobs), ("prompt_logprobs", scores)):
        if count is not None and count > vocab_size:
            raise InvalidRequest(
                f"{field} is {count}; give 0 to {vocab_size}, or -1 for all", field=field
            )
    named = grammar_of_body(body)
    wanted = [_all_if_negative(k, vocab_size) for k in (top_logprobs, scores) if k is not None]
    return GenerateRequest(
        sampling_params=_sampling_of(body, max_tokens),
        return_logprob=bool(wanted),
        top_logprobs_num=max(wanted, default=0),
        logprob_start_len=-1 if scores is None else 0,
        return_prompt_token_ids=bool(body.return_token_ids),
        stream=body.stream,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        kv_policy=body.kv_policy,
        allowed_token_ids=body.allowed_token_ids,
        grammar=None if named is None else named[1],
        logprob_law=body.logprob_law,
        return_routed_experts=body.wants_routes,
        routed_experts_start_len=body.routed_experts_prompt_start or 0,
        timeout_s=body.timeout_s,
    )


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The error with the names that this dialect gives its field, and others it speaks of."""
    prefix, _, name = error.field.rpartition(".")
    own = NATIVE_NAMES.get(name, name)
    # A name of several words is no word of a sentence.
    names = {native for native in NATIVE_NAMES if native == name or "_" in native}
    message = re.sub(r"\w+", lambda m: NATIVE_NAMES[m[0]] if m[0] in names else m[0], error.message)
    return type(error)(message, field=f"{prefix}.{own}" if prefix else own)


def _all_if_negative(count: int, vocab_size: int) -> int:
    return vocab_size if count < 0 else count
