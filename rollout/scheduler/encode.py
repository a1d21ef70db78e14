"""The numbers of one sequence as the tables store them, made before anything is changed."""

from __future__ import annotations

import msgspec
import numpy as np

from engine.errors import InvalidRequest
from engine.protocol import IntArray, Request

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
_INT32_MAX = (1 << 31) - 1
_NONE = np.empty(0, np.int32)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


class RowNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """What `SlotTable.load` writes of a request, within the range of its columns.

    max_new_tokens: at most what the context leaves. end_at: output tokens at which the sequence
    ends, unless it stops before: that, or its `hold_at`. Both are 0 of a request that samples
    nothing.
    stop_ids: int32, each once.
    """

    priority: int
    max_new_tokens: int
    end_at: int
    min_new_tokens: int
    num_alternatives: int
    stop_ids: IntArray


def row_numbers(request: Request, room: int) -> RowNumbers:
    """The numbers of `request`, whose sequence may grow by `room` tokens.

    The HTTP edge has checked ranges before; this is the leader's own look, so that a number no
    table can hold is refused with its request and never met in a step. Raises InvalidRequest
    naming the field.
    """
    sampling = request.sampling
    for name in _FLOATS:
        _require_float32(name, getattr(sampling, name))
    for token, bias in sampling.logit_bias.items():
        if bias != -np.inf:
            _require_float32("logit_bias", bias)
        _require_within("logit_bias", token, 0, _INT32_MAX)
    _require_within("top_k", sampling.top_k, -1, _INT64_MAX)
    max_new = min(_require_within("max_new_tokens", sampling.max_new_tokens, 0), room)
    if request.task != "generate":
        max_new = 0
    hold_at = _require_within("hold_at", request.hold_at, -1, _INT32_MAX)
    return RowNumbers(
        priority=_require_within("priority", request.priority, _INT64_MIN, _INT64_MAX),
        max_new_tokens=max_new,
        end_at=max_new if hold_at < 0 else min(max_new, hold_at),
        # Above what the sequence can reach, every larger minimum means the same.
        min_new_tokens=min(_require_within("min_new_tokens", sampling.min_new_tokens, 0), room + 1),
        num_alternatives=_num_alternatives(request),
        stop_ids=_stop_ids(request.stop_ids),
    )


def _num_alternatives(request: Request) -> int:
    _require_within("top_logprobs", request.top_logprobs, 0, _INT32_MAX)
    for token in request.logprob_ids:
        _require_within("logprob_ids", token, 0, _INT32_MAX)
    return _require_within("logprob_ids", request.num_alternatives, 0, _INT32_MAX)


def _stop_ids(ids: list[int]) -> IntArray:
    if not ids:
        return _NONE
    for token in ids:
        _require_within("stop_ids", token, 0, _INT32_MAX)
    return np.array(sorted(set(ids)), np.int32)


def _require_within(field: str, value: int, low: int, high: int | None = None) -> int:
    if value < low or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        raise InvalidRequest(f"{field} is {value}; give {bounds}", field=field)
    return value


def _require_float32(field: str, value: float) -> None:
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise InvalidRequest(f"{field} is {value}; no float32 number holds that", field=field)
