"""Messages of this process are refused where the channel to an engine could not hold them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest, ReplicaState, SamplingParams, SetVersion
from rollout.replica.base import Replica
from rollout.requests.expand import expand
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.replicas import inline, make_request, spawned
from tests.helpers.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("make", [inline, spawned])
def test_a_replica_refuses_what_no_message_holds_and_serves_the_others(
    make: Callable[[], Replica],
) -> None:
    with make() as replica:
        bad = [
            make_request("a", [1], top_k=2**64),
            make_request("b", [1], temperature=math.nan),
            make_request("c", [1], stop_token_ids=[1] * 1025),
            make_request("d", [1], sampling_seed="x"),
            msgspec.structs.replace(make_request("e", [1]), priority=2**80),
            msgspec.structs.replace(make_request("f", [1]), prompt_ids=[1]),  # type: ignore[arg-type]
            msgspec.structs.replace(make_request("g", [1]), salt="\ud800"),
        ]
        replica.submit([*bad, make_request("good", [1, 2])])
        final = {}
        while len(final) < 8:
            final.update({o.rid: o for o in replica.step() if o.finish is not None})
        for request in bad:
            finish = final[request.rid].finish
            assert finish is not None and finish.error == "InvalidRequest", request.rid
        assert final["good"].token_ids.tolist() == expected_tokens([1, 2], 8)
        for version in (2**63, 2**70, -1):
            with pytest.raises(InvalidRequest, match="version"):
                replica.send(SetVersion(version=version))
        assert replica.state().version == 0


@pytest.fixture(scope="module")
def state() -> ReplicaState:
    with inline() as replica:
        return replica.state()


@pytest.mark.parametrize(
    ("options", "sampling", "field"),
    [
        ({}, {"n": 1025}, "n"),
        ({}, {"n": 2**31 - 1}, "n"),
        ({"rid": "x" * 257}, {}, "rid"),
        ({"rid": 5}, {}, "rid"),
        ({"cache_salt": "x" * 4097}, {}, "cache_salt"),
        ({"priority": 2**63}, {}, "priority"),
        ({"stream": 1}, {}, "stream"),
        ({"text": None, "input_ids": [1.5]}, {}, "input_ids"),
        ({"text": None, "input_ids": [-(2**63)]}, {}, "input_ids"),
        ({"text": None, "input_ids": [[1], [2, 3]]}, {}, "input_ids"),
        ({}, {"stop": [5]}, "stop"),
        ({}, {"temperature": np.float32(1)}, "temperature"),
    ],
)
def test_expansion_refuses_before_anything_is_made(
    state: ReplicaState, options: Any, sampling: Any, field: str
) -> None:
    wire = GenerateRequest(
        **{"text": "ab", "sampling_params": SamplingParams(**sampling), **options}
    )
    with pytest.raises(InvalidRequest) as caught:
        expand(wire, tiny_tokenizer(), state, 1)
    assert caught.value.field == field


def test_a_group_larger_than_all_that_may_wait_is_refused(state: ReplicaState) -> None:
    small = msgspec.structs.replace(state, max_running=3, max_waiting=4)
    wire = GenerateRequest(text="ab", sampling_params=SamplingParams(n=8))
    with pytest.raises(InvalidRequest, match="lets 4 wait") as caught:
        expand(wire, tiny_tokenizer(), small, 1)
    assert caught.value.field == "n"
    four = msgspec.structs.replace(wire, sampling_params=SamplingParams(n=4))
    assert len(expand(four, tiny_tokenizer(), small, 1)) == 4
