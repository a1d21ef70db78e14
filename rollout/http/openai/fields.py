"""Which fields a body of OpenAI's routes may have: `known_fields`, and those that are served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.requests.json_types import decode_json
from rollout.requests.known_fields import UNSERVED, WITHOUT_EFFECT, Bodies
from rollout.requests.nearest import nearest

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
    "routed_experts_start_len": "routed_experts_prompt_start",
}
"""Fields of the native dialect by their names in this one."""


def check_fields(fields: Fields, kind: type[msgspec.Struct], bodies: Bodies = "openai") -> None:
    """Check the fields of a body for the struct `kind`, those of its `stream_options` included.
    bodies: the table of what is known beside them.

    Raises UnsupportedOption for one that is known and not served, InvalidRequest for one that
    nobody knows; a null is no field.
    """
    _check(fields, kind.__struct_fields__, bodies, "")
    options = fields.get("stream_options")
    if options is not None and bytes(options)[:1] == b"{":
        inner: Fields = decode_json(options, dict[str, Raw], field="stream_options")
        served = ("include_usage",)
        _check(inner, served, "openai stream_options", "stream_options.")


def _check(
    fields: Fields,
    served: tuple[str, ...],
    bodies: Bodies,
    prefix: str,
) -> None:
    without_effect, unserved = WITHOUT_EFFECT[bodies], UNSERVED[bodies]
    # In the body's order, so that of two faults the same one is named every time.
    for name in fields:
        if name in served:
            continue
        if name in unserved:
            value = decode_json(fields[name], Any, field=prefix + name, what=prefix + name)
            if value and value not in unserved[name]:
                raise _not_served(prefix + name)
        elif name not in without_effect and bytes(fields[name]) != b"null":
            known = {*served, *without_effect, *unserved}
            raise _unknown(prefix, name, NATIVE_NAMES.get(name), known, served)


def _not_served(field: str) -> UnsupportedOption:
    return UnsupportedOption(f"{field} is not served by this engine; leave it out", field=field)


def _unknown(
    prefix: str, name: str, native: str | None, known: set[str], served: tuple[str, ...]
) -> InvalidRequest:
    meant = native if native in served else nearest(name, known)
    advice = "leave it out" if meant is None else f"did you mean {prefix}{meant}?"
    field = prefix + name
    return InvalidRequest(f"{field} is not a field of this route; {advice}", field=field)
