"""Which weights a reply says it came from."""

from __future__ import annotations

import numpy as np

from engine.protocol import (
    FinishReason,
    GenerateRequest,
    Request,
    RequestOutput,
    SamplingParams,
    VersionSpan,
)
from rollout.requests.respond import respond


def meta_of(**output: object) -> dict[str, object]:
    ids = np.arange(4, dtype=np.int32)
    request = Request(rid="a", prompt_ids=ids, sampling=SamplingParams(), seed=0)
    made = RequestOutput(
        rid="a",
        start=0,
        token_ids=ids[:3],
        logprobs=np.zeros(3, np.float32),
        finish=FinishReason(type="length", length=3),
        **output,
    )
    return respond(GenerateRequest(input_ids=[0]), request, made, None).meta_info


def test_versions_of_tokens_and_of_their_kv() -> None:
    meta = meta_of(
        spans=[VersionSpan(1, 0, 2), VersionSpan(2, 2, 3)],
        kv_spans=[VersionSpan(1, 0, 5), VersionSpan(2, 5, 6)],
        num_restarts=2,
    )
    assert meta["weight_versions"] == [
        {"version": "1", "start": 0, "end": 2},
        {"version": "2", "start": 2, "end": 3},
    ]
    assert meta["kv_versions"] == [
        {"version": "1", "start": 0, "end": 5},
        {"version": "2", "start": 5, "end": 6},
    ]
    assert (meta["weight_version"], meta["num_restarts"]) == ("2", 2)


def test_what_a_stop_string_cut_off_is_not_spoken_of() -> None:
    meta = meta_of(
        spans=[VersionSpan(1, 0, 5), VersionSpan(2, 5, 9)],
        kv_spans=[VersionSpan(1, 0, 9), VersionSpan(2, 9, 12)],
    )
    assert meta["weight_versions"] == [{"version": "1", "start": 0, "end": 3}]
    assert meta["kv_versions"] == [{"version": "1", "start": 0, "end": 7}]


def test_a_request_that_never_ran_has_none() -> None:
    meta = meta_of()
    assert (meta["weight_version"], meta["weight_versions"], meta["kv_versions"]) == (None, [], [])
