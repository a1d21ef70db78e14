"""Which fields a body of OpenAI's routes may have: served, known and without effect, or refused.

A field that is not served and would change the answer is refused by its name, and so is one that
nobody knows: a misspelt `temperature` would otherwise be an answer at another temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.http.native.generate_call import HINTS
from rollout.requests.json_types import decode_json
from rollout.requests.nearest import nearest
from rollout.requests.wire import NOT_SERVED

Fields = Mapping[str, Raw]

NATIVE_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "top_logprobs_num": "logprobs",
    "logprob_start_len": "prompt_logprobs",
    "input_ids": "prompt",
    "text": "prompt",
    "no_stop_trim": "include_stop_str_in_output",
    "return_prompt_token_ids": "return_token_ids",
    "rid": "request_id",
}
"""Fields of the native dialect by their names in this one."""

_WITHOUT_EFFECT = HINTS | {
    "include_reasoning",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "separate_reasoning",
    "service_tier",
    "store",
    "stream_reasoning",
    "user",
}
"""What clients tell about themselves, and how replies are to be split that are never split."""

_UNSERVED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(NOT_SERVED - HINTS, ()),
    **dict.fromkeys(
        (
            "add_special_tokens",
            "allowed_token_ids",
            "audio",
            "bad_words",
            "continue_final_message",
            "documents",
            "early_stopping",
            "echo",
            "functions",
            "guided_choice",
            "guided_decoding_backend",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "guided_whitespace_pattern",
            "hold_at",
            "kv_transfer_params",
            "logits_processors",
            "media_io_kwargs",
            "mm_processor_kwargs",
            "moderation",
            "output_ids",
            "prediction",
            "prompt_embeds",
            "reasoning_effort",
            "repetition_detection",
            "return_meta_info",
            "session",
            "structured_outputs",
            "suffix",
            "thinking_token_budget",
            "token_ids_logprob",
            "truncate_prompt_tokens",
            "use_beam_search",
            "vllm_xargs",
            "web_search_options",
        ),
        (),
    ),
    "function_call": ("none", "auto"),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "truncation_side": ("left", "right"),
    "verbosity": ("medium",),
}
"""Options that would change the answer and that this engine does not have, with the values that
ask for what is served; null, false, 0 and what is empty ask for nothing."""

_PAIRED = ("best_of", "parallel_tool_calls")
"""What `_check_pairs` looks at."""

_STREAM_WITHOUT_EFFECT = frozenset({"include_obfuscation"})
_STREAM_UNSERVED: dict[str, tuple[Any, ...]] = {"continuous_usage_stats": ()}


def check_fields(fields: Fields, kind: type[msgspec.Struct]) -> None:
    """Check the fields of a body for the struct `kind`, those of its `stream_options` included.

    Raises UnsupportedOption for one that is known and not served, InvalidRequest for one that
    nobody knows; a null is no field.
    """
    _check(fields, kind.__struct_fields__, _WITHOUT_EFFECT, _UNSERVED, "")
    _check_pairs(fields)
    options = fields.get("stream_options")
    if options is not None and bytes(options)[:1] == b"{":
        inner: Fields = decode_json(options, dict[str, Raw], field="stream_options")
        served = ("include_usage",)
        _check(inner, served, _STREAM_WITHOUT_EFFECT, _STREAM_UNSERVED, "stream_options.")


def _check(
    fields: Fields,
    served: tuple[str, ...],
    without_effect: frozenset[str],
    unserved: Mapping[str, tuple[Any, ...]],
    prefix: str,
) -> None:
    # In the body's order, so that of two faults the same one is named every time.
    for name in fields:
        if name in served or name in _PAIRED:
            continue
        if name in unserved:
            value = decode_json(fields[name], Any, field=prefix + name, what=prefix + name)
            if value and value not in unserved[name]:
                raise _not_served(prefix + name)
        elif name not in without_effect and bytes(fields[name]) != b"null":
            known = {*served, *without_effect, *unserved}
            raise _unknown(prefix, name, NATIVE_NAMES.get(name), known, served)


def _check_pairs(fields: Fields) -> None:
    """Options whose meaning depends on another."""
    found = {
        name: decode_json(fields[name], Any, field=name, what=name)
        for name in ("best_of", "n", "parallel_tool_calls", "tools")
        if name in fields
    }
    if found.get("best_of") not in (None, found.get("n") or 1):
        raise UnsupportedOption(
            "best_of is not served; leave it out or equal to n", field="best_of"
        )
    if found.get("parallel_tool_calls") is False and found.get("tools"):
        raise _not_served("parallel_tool_calls")


def _not_served(field: str) -> UnsupportedOption:
    return UnsupportedOption(f"{field} is not served by this engine; leave it out", field=field)


def _unknown(
    prefix: str, name: str, native: str | None, known: set[str], served: tuple[str, ...]
) -> InvalidRequest:
    meant = native if native in served else nearest(name, known)
    advice = "leave it out" if meant is None else f"did you mean {prefix}{meant}?"
    field = prefix + name
    return InvalidRequest(f"{field} is not a field of this route; {advice}", field=field)
