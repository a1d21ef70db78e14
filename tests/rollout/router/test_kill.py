"""kill -9 of a worker under load: every request is answered, as if nothing had been."""

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.helpers.fake_executor import expected_tokens
from tests.helpers.router_process import fleet, router_process
from tests.helpers.serve_process import ServerProcess

NUM_TOKENS = 100
PACED = "tests.helpers.paced_executor:build"
Read = Callable[[bytes], list[list[int]]]


def events(body: bytes) -> list[dict[str, Any]]:
    lines = [line for line in body.split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]", lines[-1]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


def generated(body: bytes) -> list[list[int]]:
    found = json.loads(body)
    return [one["output_ids"] for one in (found if isinstance(found, list) else [found])]


def streamed(body: bytes) -> list[list[int]]:
    found: list[int] = []
    for event in events(body):
        # Each has everything so far: whatever came stays.
        assert event["output_ids"][: len(found)] == found
        assert len(event["output_ids"]) > len(found) or event["meta_info"]["finish_reason"]
        found = event["output_ids"]
    return [found]


def completed(body: bytes) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    names = set()
    for event in events(body):
        names.add(event["id"])
        for choice in event["choices"]:
            found.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert len(names) == 1
    return [found[index] for index in sorted(found)]


def tokens(body: bytes) -> list[list[int]]:
    return [choice["token_ids"] for choice in json.loads(body)["choices"]]


def calls(number: int) -> tuple[str, dict[str, Any], Read]:
    """A request by its number, one of five kinds."""
    ids = [number % 90, 3, 5, number // 90]
    native = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    plain = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return (
        ("/generate", {"input_ids": ids, "sampling_params": native}, generated),
        ("/generate", {"input_ids": ids, "sampling_params": {**native, "n": 4}}, generated),
        ("/generate", {"input_ids": ids, "sampling_params": native, "stream": True}, streamed),
        (
            "/v1/completions",
            {"prompt": ids, "n": 2, "stream": True, "return_token_ids": True, **plain},
            completed,
        ),
        ("/inference/v1/generate", {"token_ids": ids, "sampling_params": plain}, tokens),
    )[number % 5]


async def ask(http: httpx.AsyncClient, number: int) -> None:
    path, body, read = calls(number)
    reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    ids = body.get("input_ids") or body.get("prompt") or body["token_ids"]
    wanted = expected_tokens(ids, NUM_TOKENS)
    for found in read(reply.content):
        assert found == wanted, (number, path)


def counter(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(f"slipstream_router_{name}_total "):
            return float(line.split()[-1])
    raise AssertionError(name)


def load_of(url: str, worker: str) -> int:
    listed = httpx.get(f"{url}/workers").json()["workers"]
    return next((one["load"] for one in listed if one["url"] == worker), 0)


async def under_load(url: str, victim: ServerProcess, sign: int) -> None:
    """Every request is right, although `victim` gets a signal once its journals have begun."""
    noted = counter(url, "journal_bytes")
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as http:
        work = [asyncio.create_task(ask(http, number)) for number in range(40)]
        while not await asyncio.to_thread(load_of, url, victim.url) or (
            await asyncio.to_thread(counter, url, "journal_bytes") < noted + 10_000
        ):
            await asyncio.sleep(0.01)
        victim.process.send_signal(sign)
        await asyncio.gather(*work)


@pytest.mark.slow
def test_a_worker_that_is_killed_or_told_to_leave_loses_no_request() -> None:
    at_once, least = "drain_timeout_s=0", "policy='least_load'"
    with fleet(3, options=least, server=at_once, factory=PACED) as (router, workers):
        asyncio.run(under_load(router.url, workers[1], signal.SIGKILL))
        assert counter(router.url, "lost") > 0
        before = counter(router.url, "resumed")
        assert before > 0
        # A server that is told to leave gives what it has to the others, too.
        asyncio.run(under_load(router.url, workers[0], signal.SIGTERM))
        assert counter(router.url, "resumed") > before


@pytest.mark.slow
def test_a_terminal_that_closes_ends_a_router_as_sigterm_does() -> None:
    with router_process() as router:
        router.process.send_signal(signal.SIGHUP)
        assert router.process.wait(60) == 0
