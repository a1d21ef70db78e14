"""`serve --router`: servers of their own processes that register, and say when they leave."""

import asyncio

import httpx
import pytest

from rollout.http.registration import Registration, own_url
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.router_process import fleet, wait_for
from tests.helpers.routers import PATIENCE_S, FakeWorker, Line, Seen, run


def test_servers_register_answer_and_leave() -> None:
    with fleet(2, options="policy='round_robin'") as (router, workers):
        listed = httpx.get(f"{router.url}/list_workers").json()["urls"]
        assert sorted(listed) == sorted(worker.url for worker in workers)
        sampling = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0.0}
        body = {"input_ids": [1, 2, 3], "sampling_params": sampling}
        for _ in range(4):
            reply = httpx.post(f"{router.url}/generate", json=body)
            assert reply.json()["output_ids"] == expected_tokens([1, 2, 3], 6)
        assert workers[0].terminate() == 0
        wait_for(router.url, 1)
        assert httpx.get(f"{router.url}/list_workers").json()["urls"] == [workers[1].url]
        assert router.terminate() == 0


@pytest.mark.parametrize(
    ("host", "router", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9", "http://127.0.0.1:5"),
        ("0.0.0.0", "http://127.0.0.1:9", "http://127.0.0.1:5"),
        ("::1", "http://[::1]:9", "http://[::1]:5"),
        ("10.1.2.3", "http://127.0.0.1:9", "http://10.1.2.3:5"),
    ],
)
def test_a_server_says_where_others_reach_it(host: str, router: str, url: str) -> None:
    assert own_url(host, 5, router) == url


@pytest.mark.parametrize("page", [b"<html>Sign in</html>", b"[]", b'{"worker_id": 5}'])
def test_a_server_goes_on_registering_where_something_else_answered_once(page: bytes) -> None:
    async def test() -> None:
        async def answer(seen: Seen, line: Line) -> None:
            line.reply(page if len(router.seen) == 1 else b'{"worker_id": "w"}')

        router = FakeWorker(answer)
        await router.start()
        registration = Registration(router.url, "http://127.0.0.1:5")
        registration.start()
        async with asyncio.timeout(PATIENCE_S):
            while len(router.calls("/workers")) < 2:
                await asyncio.sleep(0.01)
        await registration.leave()
        await router.stop()

    run(test)
