"""Bodies of OpenAI's completions and chat, with vLLM's extensions, and what they ask for."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, KvPolicy, SamplingParams
from engine.protocol.types import (
    ClientId,
    Float32,
    Int32,
    Int64,
    LogitBias,
    Message,
    Penalty,
    Salt,
    StopString,
    StopStrings,
    TokenIds,
)
from rollout.decoding import check_depth, decode_json
from rollout.text.chat_template import check_variables

T = TypeVar("T", bound=msgspec.Struct)

# Options that would change the output and that this engine does not have.
_UNSERVED = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "response_format",
    "use_beam_search",
    "suffix",
    "echo",
    "truncate_prompt_tokens",
    "prompt_embeds",
    "bad_words",
    "allowed_token_ids",
    "continue_final_message",
    "documents",
)
_LOOKED_AT = frozenset({*_UNSERVED, "best_of", "n"})
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "top_logprobs_num": "logprobs",
    "logprob_start_len": "prompt_logprobs",
    "input_ids": "prompt",
    "text": "prompt",
}


_PROMPT_KINDS: dict[bytes, Any] = {b'"': list[str], b"[": list[list[Int32]]}


class StreamOptions(msgspec.Struct):
    """include_usage: a last chunk with the counts of tokens."""

    include_usage: bool = False


class _Common(msgspec.Struct, kw_only=True):
    """Options of both routes; names and defaults of OpenAI and vLLM."""

    model: Message = ""
    n: Int32 = 1
    temperature: Float32 | None = 1.0
    top_p: Float32 | None = 1.0
    top_k: Int32 | None = -1
    min_p: Float32 | None = 0.0
    repetition_penalty: Float32 | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: LogitBias | None = None
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
    kv_policy: KvPolicy = "keep"


class CompletionBody(_Common, kw_only=True):
    """POST /v1/completions."""

    prompt: msgspec.Raw
    logprobs: Int32 | None = None
    echo: bool | None = False
    add_special_tokens: bool = True


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


def parse_openai(data: bytes, kind: type[T]) -> T:
    """The body. Raises InvalidRequest, and UnsupportedOption for an option that is set and that
    this engine does not have; other unknown fields are passed over."""
    body: T = decode_json(data or b"{}", kind, strict=False)
    fields: dict[str, msgspec.Raw] = decode_json(data or b"{}", dict[str, msgspec.Raw])
    looked_at = (_LOOKED_AT - set(kind.__struct_fields__) | {"n"}) & fields.keys()
    _check_served({name: decode_json(fields[name], Any, field=name) for name in looked_at})
    if isinstance(body, ChatBody):
        for field in ("messages", "tools", "chat_template_kwargs"):
            check_depth(getattr(body, field) or [], field)
        check_variables(body.chat_template_kwargs or {})
    return body


def prompts_of(prompt: msgspec.Raw) -> list[str] | list[list[int]]:
    """The prompts of `prompt`: a text, a list of texts, ids, or a list of lists of ids."""
    start = bytes(memoryview(prompt)[:64]).lstrip()
    if start.startswith(b'"'):
        return [_prompt(prompt, str)]
    inner = start[1:].lstrip()[:1]
    if not start.startswith(b"[") or inner == b"]":
        raise InvalidRequest("prompt must be text, ids, or a list of either", field="prompt")
    if inner.isdigit() or inner == b"-":
        return [_prompt(prompt, list[Int32])]
    found: list[str] | list[list[int]] = _prompt(prompt, _PROMPT_KINDS.get(inner, list[str]))
    return found


def _prompt(prompt: msgspec.Raw, kind: Any) -> Any:
    try:
        return decode_json(prompt, kind, what="prompt")
    except InvalidRequest as error:
        raise InvalidRequest(f"prompt: {error.message}", field="prompt") from error


def _check_served(fields: dict[str, Any]) -> None:
    for name in _UNSERVED:
        value = fields.get(name)
        plain_text = name == "response_format" and value == {"type": "text"}
        if value and not plain_text:
            raise UnsupportedOption(
                f"{name} is not served by this engine; leave it out", field=name
            )
    if fields.get("best_of") not in (None, fields.get("n", 1)):
        raise UnsupportedOption(
            "best_of is not served; leave it out or equal to n", field="best_of"
        )


def sampling_of(body: CompletionBody | ChatBody, max_tokens: int) -> SamplingParams:
    """The options under their native names; null and vLLM's 0 stand for the default."""
    return SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=body.top_k or -1,
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
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
    """
    scores = body.prompt_logprobs
    wanted = [_all_if_negative(k, vocab_size) for k in (top_logprobs, scores) if k is not None]
    return GenerateRequest(
        sampling_params=sampling_of(body, max_tokens),
        return_logprob=bool(wanted),
        top_logprobs_num=max(wanted, default=0),
        logprob_start_len=-1 if scores is None else 0,
        return_prompt_token_ids=bool(body.return_token_ids),
        stream=body.stream,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        kv_policy=body.kv_policy,
    )


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The error with the names that this dialect gives the fields."""
    prefix, _, name = error.field.rpartition(".")
    if name not in _NAMES:
        return error
    field = f"{prefix}.{_NAMES[name]}" if prefix else _NAMES[name]
    message = re.sub(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])", _NAMES[name], error.message)
    return type(error)(message, field=field)


def _all_if_negative(count: int, vocab_size: int) -> int:
    return vocab_size if count < 0 else count


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
