"""Which weights a reply says it came from."""

from __future__ import annotations

import numpy as np

from engine.protocol import (
    FinishReason,
    GenerateRequest,
    Request,
    RequestOutput,
    SamplingParams,
    SpecCounts,
    VersionSpan,
)
from rollout.requests.respond import respond
from rollout.scheduler.speculative.reply_fields import joined_spec_meta, spec_meta

REQUEST = Request(
    rid="a", prompt_ids=np.arange(4, dtype=np.int32), sampling=SamplingParams(), seed=0
)


def meta_of(**output: object) -> dict[str, object]:
    ids = np.arange(4, dtype=np.int32)
    made = RequestOutput(
        rid="a",
        start=0,
        token_ids=ids[:3],
        logprobs=np.zeros(3, np.float32),
        finish=FinishReason(type="length", length=3),
        **output,
    )
    return respond(GenerateRequest(input_ids=[0]), REQUEST, made, None).meta_info


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


def test_counts_of_drafts_are_named_as_sglang_names_them() -> None:
    meta = meta_of(spec=SpecCounts(verifies=4, drafted=10, accepted=5))
    assert {key: value for key, value in meta.items() if key.startswith("spec_")} == {
        "spec_verify_ct": 4,
        "spec_num_proposed_drafts": 10,
        "spec_num_correct_drafts": 5,
        "spec_draft_token_num": 10,
        "spec_accept_token_num": 5,
        "spec_accept_length": 2.25,
        "spec_accept_rate": 0.5,
    }
    assert "synthetic" not in meta
    nothing = meta_of(spec=SpecCounts())
    assert nothing["spec_verify_ct"] == 0
    assert "spec_accept_length" not in nothing
    assert not [key for key in meta_of() if key.startswith("spec_")]
    assert meta_of(spec=SpecCounts(synthetic=True))["synthetic"] is True


def test_a_reply_in_parts_says_what_its_servers_drafted_together() -> None:
    parts = [
        meta_of(spec=SpecCounts(verifies=4, drafted=10, accepted=5)),
        meta_of(),
        meta_of(spec=SpecCounts(verifies=1, drafted=2, accepted=1)),
    ]
    found = joined_spec_meta(parts)
    counts = SpecCounts(verifies=5, drafted=12, accepted=6)
    assert found == spec_meta(counts, REQUEST)
    assert joined_spec_meta([meta_of()]) == {}
