"""Rollouts that record routes: each call brings those that its branch lacks; no client notices."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest

from rollout.scheduler.routes.reply_fields import decoded_routes
from tests.helpers.http_app import run, serving
from tests.helpers.mock_routes import fake_routes
from tests.helpers.replicas import fake_config
from tests.rollout.http.capture.test_rollout_routes import MORE, USER, chat, flat, opened, record

EXPERTS = fake_config("experts", routes=True, max_waiting=4000)


@pytest.mark.parametrize("asks", [False, True])
def test_a_conversation_has_each_route_once(asks: bool) -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            base = await opened(server, return_routed_experts=True)
            messages: list[Any] = [USER]
            starts = []
            for _ in range(3):
                fields = {"return_routed_experts": True} if asks else {}
                reply = await chat(server, base, messages, **fields)
                choice = reply["choices"][0]
                sent = server.link.requests[-1]
                starts.append((sent.routed_experts_start_len, len(sent.prompt_ids)))
                assert ("routed_experts" in choice) == asks
                if asks:
                    file = io.BytesIO(base64.b64decode(choice["routed_experts"]))
                    assert len(np.load(file)) == len(sent.prompt_ids) + 3
                messages = [*messages, choice["message"], MORE]
            found = await record(server, base)
            assert found["return_routed_experts"]
            (branch,) = found["branches"]
            routes = decoded_routes(branch)
            assert routes is not None and routes.dtype == np.uint8
            np.testing.assert_array_equal(routes, fake_routes(flat(branch)))
            # A call asks from the last token of the call before, which had no route yet.
            behind = [size + 3 for _, size in starts[:-1]]
            assert [start for start, _ in starts] == [0, *([0, 0] if asks else behind)]

    run(test)


def test_branches_of_ids_share_what_they_share() -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            base = await opened(server, return_routed_experts=True)
            for prompt in ([5, 6, 7], [5, 6, 8]):
                body = {"prompt": prompt, "max_tokens": 4, "n": 2, "return_token_ids": True}
                first = (await server.post(f"{base}/completions", body)).json()["choices"][0]
                longer = [*prompt, *first["token_ids"], 9]
                await server.post(f"{base}/completions", {"prompt": longer, "max_tokens": 3})
            found = await record(server, base)
            assert len(found["branches"]) == 4
            for branch in found["branches"]:
                routes = decoded_routes(branch)
                np.testing.assert_array_equal(routes, fake_routes(flat(branch)))

    run(test)


def test_a_rollout_that_does_not_ask_has_none() -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            base = await opened(server)
            await chat(server, base, [USER])
            found = await record(server, base)
            assert not found["return_routed_experts"]
            assert "routed_experts" not in found["branches"][0]
            assert not server.link.requests[-1].return_routed_experts

    run(test)
