"""Whether the numbers of a request fit where they will be kept. A pure function.

A number that is in range for its meaning may still be more than a column of the slot table, a
message to a rank or a vector on the device holds, and would only be noticed in the middle of a
step, which other requests share.
"""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidRequest
from engine.protocol import Request

_LARGEST = float(np.finfo(np.float32).max)
_INTS: dict[str, type[np.signedinteger]] = {
    "priority": np.int64,
    "seed": np.int64,
    "top_logprobs": np.int32,
    "prompt_logprob_start": np.int32,
}
_SAMPLING_INTS: dict[str, type[np.signedinteger]] = {
    "top_k": np.int64,
    "min_new_tokens": np.int32,
}
_SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


def check_storable(request: Request) -> None:
    """Raise InvalidRequest, naming the field, for a number that has no place."""
    sampling = request.sampling
    for field, kind in _INTS.items():
        _check_int(field, getattr(request, field), kind)
    for field, kind in _SAMPLING_INTS.items():
        _check_int(field, getattr(sampling, field), kind)
    # The table counts from the start of the prompt.
    total = len(request.prompt_ids) + sampling.min_new_tokens
    _check_int("min_new_tokens", total, np.int32)
    for field in _SAMPLING_FLOATS:
        _check_float(field, getattr(sampling, field))
    for bias in sampling.logit_bias.values():
        if bias != -np.inf:
            _check_float("logit_bias", bias)


def _check_int(field: str, value: int, kind: type[np.signedinteger]) -> None:
    limits = np.iinfo(kind)
    if not limits.min <= value <= limits.max:
        raise InvalidRequest(
            f"{field} is {value}, more than the engine can count; give at most {limits.max}",
            field=field,
        )


def _check_float(field: str, value: float) -> None:
    if abs(value) > _LARGEST:
        raise InvalidRequest(
            f"{field} is {value}, which is no finite number in float32", field=field
        )
