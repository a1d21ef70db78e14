"""Routes of replies in parts: what the next part asks for, and the whole."""

from __future__ import annotations

import numpy as np
import pytest

from engine.protocol import GenerateRequest, GenerateResponse, RequestOutput, RouteArray
from rollout.requests.parts import continued
from rollout.scheduler.routes.reply_fields import (
    decoded_routes,
    encoded_routes,
    joined_route_meta,
    npy_routes,
    route_meta,
)


def routes_of(first: int, stop: int, version: int = 0) -> RouteArray:
    """Routes of positions [first, stop), which say their position and who computed them."""
    positions = np.arange(first, stop, dtype=np.uint8)
    return np.stack([positions, np.full_like(positions, version)], axis=-1)[:, None]


def meta(first: int, stop: int, version: int = 0) -> dict[str, object]:
    output = RequestOutput(
        rid="a",
        start=0,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        routed_experts=routes_of(first, stop, version),
        routed_experts_start=first,
    )
    return route_meta(output, "uint8")


@pytest.mark.parametrize("start", [0, 3, 5])
def test_each_token_has_the_route_of_the_part_that_sampled_behind_it(start: int) -> None:
    whole = joined_route_meta([meta(0, 5), meta(start, 9, version=1), meta(9, 9, version=2)])
    expected = np.concatenate((routes_of(0, 5), routes_of(5, 9, version=1)))
    np.testing.assert_array_equal(decoded_routes(whole), expected)
    assert whole["routed_experts_start_len"] == 0


def test_a_stop_that_came_with_a_part_cuts_them() -> None:
    whole = joined_route_meta([meta(0, 7), meta(2, 4, version=1)])
    np.testing.assert_array_equal(decoded_routes(whole), routes_of(0, 4))


def test_a_gap_leaves_none() -> None:
    assert joined_route_meta([meta(0, 5), meta(6, 9)]) == {}
    assert joined_route_meta([meta(0, 5), {"id": "a"}]) == {}
    assert joined_route_meta([]) == {}


def test_the_next_part_asks_for_what_is_missing() -> None:
    request = GenerateRequest(input_ids=[1, 2], return_routed_experts=True)
    reasons = {"finish_reason": {"type": "hold", "length": 2}}
    replies = [
        GenerateResponse(output_ids=[3] * n, meta_info={**reasons, **meta(0, 1 + n)})
        for n in (2, 1)
    ]
    assert continued(request, replies).routed_experts_start_len == 2
    bare = [GenerateResponse(output_ids=[3], meta_info=reasons)]
    assert continued(request, bare).routed_experts_start_len == 0


@pytest.mark.parametrize(
    ("stored", "dtype", "absent"),
    [
        (np.uint8, "uint8", 255),
        (np.uint8, "uint16", 65535),
        (np.uint8, "int32", -1),
        (np.uint16, "uint16", 65535),
        (np.uint16, "int32", -1),
    ],
)
def test_absent_routes_have_a_mark_in_every_dtype(stored: type, dtype: str, absent: int) -> None:
    routes = np.array([[[0, 254]], [[np.iinfo(stored).max] * 2]], stored)
    found = decoded_routes(encoded_routes(routes, dtype))
    assert found is not None and found.dtype == dtype
    assert found.tolist() == [[[0, 254]], [[absent, absent]]]


def test_an_output_without_them_has_no_fields() -> None:
    bare = RequestOutput(
        rid="a", start=0, token_ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32)
    )
    assert route_meta(bare, "int32") == {} and npy_routes(bare, 0) is None
    assert decoded_routes({}) is None
