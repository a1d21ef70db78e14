"""Every bad request is refused with a typed error that names the field."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import Request, SamplingParams
from rollout.scheduler.validate import Limits, check_request
from tests.helpers.scheduling import make_request

LIMITS = Limits(context_length=32, vocab_size=50, kv_tokens=24)


def test_accepts_the_edges():
    check_request(make_request("a", range(24), max_new=1), LIMITS)
    check_request(make_request("b", [0, 49], min_new_tokens=8, top_p=1.0, min_p=0.0), LIMITS)
    check_request(
        make_request("c", [1], temperature=0.0, top_k=1, logit_bias={3: -math.inf}), LIMITS
    )
    check_request(make_request("d", [1, 2], max_new=0, prompt_logprob_start=0), LIMITS)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt_ids", make_request("a", [])),
        ("prompt_ids", make_request("a", [1, -1])),
        ("prompt_ids", make_request("a", [1, 50])),
        ("temperature", make_request("a", [1], temperature=-0.1)),
        ("temperature", make_request("a", [1], temperature=math.nan)),
        ("temperature", make_request("a", [1], temperature=math.inf)),
        ("top_p", make_request("a", [1], top_p=0.0)),
        ("top_p", make_request("a", [1], top_p=1.1)),
        ("top_p", make_request("a", [1], top_p=math.nan)),
        ("min_p", make_request("a", [1], min_p=-0.1)),
        ("min_p", make_request("a", [1], min_p=1.5)),
        ("top_k", make_request("a", [1], top_k=0)),
        ("top_k", make_request("a", [1], top_k=-2)),
        ("repetition_penalty", make_request("a", [1], repetition_penalty=0.0)),
        ("frequency_penalty", make_request("a", [1], frequency_penalty=math.inf)),
        ("presence_penalty", make_request("a", [1], presence_penalty=math.nan)),
        ("max_new_tokens", make_request("a", [1], max_new=0)),
        ("max_new_tokens", make_request("a", [1], max_new=-3)),
        ("min_new_tokens", make_request("a", [1], max_new=4, min_new_tokens=5)),
        ("min_new_tokens", make_request("a", [1], min_new_tokens=-1)),
        ("stop_ids", make_request("a", [1], stop_ids=[50])),
        ("stop_token_ids", make_request("a", [1], stop_token_ids=[-1])),
        ("logit_bias", make_request("a", [1], logit_bias={50: 1.0})),
        ("logit_bias", make_request("a", [1], logit_bias={1: math.nan})),
        ("prompt_logprob_start", make_request("a", [1], prompt_logprob_start=1)),
        ("prompt_logprob_start", make_request("a", [1], prompt_logprob_start=-2)),
        ("top_logprobs", make_request("a", [1], top_logprobs=-1)),
        ("top_logprobs", make_request("a", [1], top_logprobs=51)),
        ("seed", make_request("a", [1], seed=-1)),
        ("seed", make_request("a", [1], seed=2**63)),
    ],
)
def test_refuses_and_names_the_field(field: str, request_: Request):
    with pytest.raises(InvalidRequest) as caught:
        check_request(request_, LIMITS)
    assert caught.value.field == field
    assert field in caught.value.message


DRAFTS = msgspec.structs.replace(LIMITS, draft_tokens=3, forces=True)
PLAIN = msgspec.structs.replace(LIMITS, draft_tokens=3)


@pytest.mark.parametrize(
    ("field", "limits", "fields"),
    [
        ("draft_tokens", DRAFTS, {"draft_tokens": 4}),
        ("draft_tokens", DRAFTS, {"draft_tokens": -2}),
        ("draft_tokens", DRAFTS, {"draft_tokens": 2**31}),
        ("draft_tokens", DRAFTS, {"draft_tokens": 1.5}),
        ("draft_tokens", LIMITS, {"draft_tokens": 1}),
        ("forced_acceptance", DRAFTS, {"forced_acceptance": 1.01}),
        ("forced_acceptance", DRAFTS, {"forced_acceptance": -0.5}),
        ("forced_acceptance", DRAFTS, {"forced_acceptance": math.nan}),
        ("forced_acceptance", DRAFTS, {"forced_acceptance": math.inf}),
        ("forced_acceptance", PLAIN, {"forced_acceptance": 0.5}),
        ("forced_acceptance", LIMITS, {"forced_acceptance": 0.0}),
    ],
)
def test_drafts_that_the_server_has_not_are_refused(
    field: str, limits: Limits, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(make_request("a", [1], **fields), limits)
    assert caught.value.field == field
    assert field in caught.value.message


def test_accepts_the_drafts_that_the_server_has() -> None:
    for fields in ({"draft_tokens": 3}, {"draft_tokens": 0}, {"draft_tokens": -1}):
        check_request(make_request("a", [1], **fields), PLAIN)
    for forced in (0.0, 1.0, -1.0):
        check_request(make_request("a", [1], forced_acceptance=forced), DRAFTS)
    check_request(make_request("a", [1], draft_tokens=0, forced_acceptance=-1.0), LIMITS)


@pytest.mark.parametrize("prompt", [np.zeros((1, 2), np.int32), np.zeros(3, np.float32), [1, 2]])
def test_refuses_prompts_that_are_not_id_arrays(prompt: object):
    request = Request(rid="a", prompt_ids=prompt, sampling=SamplingParams(), seed=0)
    with pytest.raises(InvalidRequest, match="one-dimensional array of integers"):
        check_request(request, LIMITS)


def test_refuses_prompts_too_long_for_context_or_pool():
    with pytest.raises(ContextTooLong, match="context of 32"):
        check_request(make_request("a", [1] * 32), LIMITS)
    with pytest.raises(ContextTooLong, match="KV pool of 24 tokens"):
        check_request(make_request("a", [1] * 25), LIMITS)
