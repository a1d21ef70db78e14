"""Requests as calls of /generate: what they ask for there is what was asked for here."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from engine.errors import SlipstreamError, UnsupportedOption
from engine.protocol import (
    ExpertFacts,
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    ReplicaState,
    Request,
    RequestOutput,
    SpecCounts,
    VersionSpan,
)
from rollout.replica.remote.calls import GenerateCall, generate_calls, outputs_of, refusal
from rollout.requests.expand import expand
from rollout.requests.respond import respond, to_wire
from rollout.requests.seeds import derive_seed
from tests.helpers.engines import request
from tests.helpers.replicas import inline


@pytest.fixture(scope="module")
def state() -> ReplicaState:
    with inline() as replica:
        return replica.state()


def group(name: str, count: int, **fields: Any) -> list[Request]:
    return [
        replace(
            request(f"{name}-{place}", [1, 2, 3], seed=derive_seed(8, name, place), group=name),
            stop_ids=[7, 9],
            **fields,
        )
        for place in range(count)
    ]


def served(call: GenerateCall, state: ReplicaState) -> list[Request]:
    """The requests that a server makes of a call, read from its body."""
    wire = msgspec.json.decode(msgspec.json.encode(call.wire), type=GenerateRequest)
    return expand(wire, None, state, default_seed=1)


def test_a_group_is_one_call_and_every_sample_keeps_its_seed(state: ReplicaState) -> None:
    asked = [*group("a", 4), *group("b", 3)]
    calls = generate_calls(asked, state)
    assert [len(call.requests) for call in calls] == [4, 3]
    found = [one for call in calls for one in served(call, state)]
    assert [one.seed for one in found] == [one.seed for one in asked]
    assert all(one.stop_ids == [7, 9] for one in found)
    assert all(one.prompt_ids.tolist() == [1, 2, 3] for one in found)


def test_what_differs_by_more_than_a_seed_is_a_call_of_its_own(state: ReplicaState) -> None:
    samples = group("a", 3)
    greedy = replace(samples[0], sampling=replace(samples[0].sampling, temperature=0.0))
    calls = generate_calls([*samples, replace(greedy, rid="greedy")], state)
    assert [len(call.requests) for call in calls] == [3, 1]
    odd = [replace(one, seed=one.seed ^ 2) for one in samples]
    calls = generate_calls(odd, state)
    assert [served(call, state)[0].seed for call in calls] == [one.seed for one in odd]
    calls = generate_calls(samples, replace(state, max_samples=2))
    assert [served(call, state)[0].seed for call in calls] == [one.seed for one in samples]


def test_fields_of_a_request_go_with_it(state: ReplicaState) -> None:
    fields = {
        "priority": 3,
        "salt": "x",
        "entropy": True,
        "kv_policy": "recompute",
        "hold_at": 9,
        "allowed_token_ids": np.array([4, 7], np.int32),
        "logprob_law": "masked",
        "output_ids": np.array([4], np.int32),
    }
    (call,) = generate_calls(group("a", 1, **fields), state)
    (found,) = served(call, state)
    for name, value in fields.items():
        assert np.array_equal(getattr(found, name), value), name


@pytest.mark.parametrize(
    "fields",
    [{"task": "embed"}, {"top_logprobs": 1}, {"prompt_logprob_start": 0}, {"session": "s"}],
)
def test_what_has_no_place_in_a_call_is_refused_by_name(fields: dict[str, Any]) -> None:
    (asked,) = group("a", 1, **fields)
    error = refusal(asked)
    assert isinstance(error, UnsupportedOption) and error.field in fields
    assert refusal(group("a", 1)[0]) is None


def test_an_output_is_the_same_behind_its_reply(state: ReplicaState) -> None:
    experts = ExpertFacts(num_layers=2, layers=[0, 1], num_experts=4, top_k=2)
    state = replace(state, experts=experts, keeps_routes=True)
    (call,) = generate_calls(group("a", 1, entropy=True, return_routed_experts=True), state)
    (asked,) = served(call, state)
    output = RequestOutput(
        rid="a-0",
        start=0,
        token_ids=np.array([5, 6, 7], np.int32),
        logprobs=np.array([-0.1, -1 / 3, -2.7182817], np.float32),
        finish=FinishReason(type="stop", matched=7),
        prompt_tokens=3,
        cached_tokens=2,
        num_retractions=1,
        spans=[VersionSpan(3, 0, 2), VersionSpan(4, 2, 3)],
        kv_spans=[VersionSpan(3, 0, 6)],
        entropies=np.array([0.5, 0.25, 1e-7], np.float32),
        spec=SpecCounts(verifies=2, drafted=4, accepted=1),
        routed_experts=np.array([[[0, 3], [255, 255]]] * 5, np.uint8),
    )
    body = msgspec.json.encode(to_wire(respond(call.wire, asked, output, None)))
    reply = msgspec.json.decode(body, type=GenerateResponse)
    (found,) = outputs_of(call, [reply])
    for name in RequestOutput.__struct_fields__:
        ours, theirs = getattr(found, name), getattr(output, name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name
        else:
            assert ours == theirs, name


@pytest.mark.parametrize("field", ["output_token_logprobs", "output_token_entropy"])
def test_a_reply_with_fewer_figures_than_ids_is_none(field: str, state: ReplicaState) -> None:
    (call,) = generate_calls(group("a", 1), state)
    meta: dict[str, Any] = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.5, 1, None], [-0.5, 2, None]],
        "output_token_entropy": [0.5, 0.5],
        "weight_versions": [],
        "prompt_tokens": 3,
    }
    outputs_of(call, [GenerateResponse(output_ids=[1, 2], meta_info=meta)])
    short = {**meta, field: meta[field][:1]}
    with pytest.raises(SlipstreamError, match="no reply of /generate"):
        outputs_of(call, [GenerateResponse(output_ids=[1, 2], meta_info=short)])


@pytest.mark.parametrize(
    "meta", [{}, {"finish_reason": {"type": "stop"}, "output_token_logprobs": 3}]
)
def test_what_is_no_reply_is_one_typed_error(meta: dict[str, Any], state: ReplicaState) -> None:
    (call,) = generate_calls(group("a", 1), state)
    with pytest.raises(SlipstreamError, match="no reply of /generate"):
        outputs_of(call, [GenerateResponse(output_ids=[1], meta_info=meta)])
    with pytest.raises(SlipstreamError, match="2 replies came to 1 samples"):
        outputs_of(call, [GenerateResponse()] * 2)
