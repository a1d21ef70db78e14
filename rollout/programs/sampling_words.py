"""Sampling parameters as keyword arguments of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import SamplingParams
from rollout.requests.wire import parse_request

_ELSEWHERE: Mapping[str, str] = {
    "n": "fork the state; each branch is a sample",
    "sampling_seed": "write seed",
    "no_stop_trim": "add the stop string behind what came",
}
"""Fields that a program has another way for."""


def sampling_of_words(words: Mapping[str, Any]) -> SamplingParams:
    """Fields of `SamplingParams` by name. Raises InvalidRequest naming the field that does not fit,
    or that there is not, with the one that was meant."""
    for name, instead in _ELSEWHERE.items():
        if name in words:
            raise UnsupportedOption(f"{name} is not taken here; {instead}", field=name)
    if not words:
        return SamplingParams()
    try:
        return msgspec.convert(dict(words), SamplingParams)
    except msgspec.ValidationError as error:
        # Said as /generate says it, but for what JSON has no word for.
        _explain(words)
        raise InvalidRequest(f"sampling_params: {error}", field="sampling_params") from error


def _explain(words: Mapping[str, Any]) -> None:
    for name, value in words.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{name} is {value}; give a finite number", field=name)
    try:
        parse_request(msgspec.json.encode({"sampling_params": words}))
    except TypeError as error:
        raise InvalidRequest(f"sampling_params: {error}", field="sampling_params") from error
    except InvalidRequest as error:
        shown = error.message.replace("sampling_params.", "")
        raise type(error)(shown, field=error.field.removeprefix("sampling_params.")) from error
