"""Routes come to whichever front asked for them, whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from rollout.client import routed_experts
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.front_clients import client_of, fronts_server
from tests.helpers.mock_routes import fake_routes

pytestmark = pytest.mark.slow


def check(client: httpx.Client, ids: list[int]) -> None:
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}
    reply = client.post("/generate", json={**body, "return_routed_experts": True})
    found = routed_experts(reply.json()["meta_info"])
    np.testing.assert_array_equal(found, fake_routes([*ids, *expected_tokens(ids, 40)]))


def test_each_front_returns_routes() -> None:
    with (
        fronts_server('"experts", routes=True') as server,
        client_of(server, "front-1") as first,
        client_of(server, "front-2") as second,
        ThreadPoolExecutor(8) as pool,
    ):
        calls = [([first, second][n % 2], [n, 5, 6]) for n in range(16)]
        list(pool.map(lambda call: check(*call), calls))
