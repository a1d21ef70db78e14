"""A server of several front processes: whichever answers, it is one server."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import httpx
import pytest

from tests.helpers.fake_executor import expected_tokens
from tests.helpers.front_clients import client_of, fronts_server, pids_of, state_of
from tests.helpers.serve_process import FAKE, ServerProcess, gone

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0
JSON = {"content-type": "application/json"}
LONG = {"max_new_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with fronts_server() as found:
        yield found


@pytest.fixture(scope="module")
def pair(server: ServerProcess) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """A client of each front."""
    with client_of(server, "front-1") as first, client_of(server, "front-2") as second:
        yield first, second


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def generate(client: httpx.Client, ids: list[int], count: int = 4, **more: Any) -> Any:
    sampling = {"max_new_tokens": count, "ignore_eos": True}
    return client.post("/generate", json={"input_ids": ids, "sampling_params": sampling, **more})


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    error = reply.json()["error"]
    return reply.status_code, error["type"], error["field"]


def test_every_front_answers_alike(pair: tuple[httpx.Client, httpx.Client]) -> None:
    for client in pair:
        assert generate(client, [5, 6]).json()["output_ids"] == expected_tokens([5, 6], 4)
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
        assert error_of(generate(client, []))[::2] == (400, "input_ids")
        assert client.post("/nowhere").status_code == 404
        assert client.post("/pause_generation", content=b"{", headers=JSON).status_code == 400
    # Alike once the engine has told both that the last request has ended.
    infos = [partial(client.get, "/server_info") for client in pair]
    until(lambda: infos[0]().json() == infos[1]().json())


def test_requests_without_a_seed_get_one_of_their_own_at_every_front(
    pair: tuple[httpx.Client, httpx.Client],
) -> None:
    seeds = []
    for client in pair:
        for _ in range(2):
            meta = generate(client, [5], 4, hold_at=2).json()["meta_info"]
            seeds.append(meta["sampling_seed"])
    assert len(set(seeds)) == 4


def test_what_steers_the_engine_at_one_front_is_so_at_all(
    pair: tuple[httpx.Client, httpx.Client], pool: ThreadPoolExecutor
) -> None:
    first, second = pair
    second.post("/pause_generation", json={"mode": "in_place"})
    assert first.post("/is_paused").status_code == 405
    assert first.get("/is_paused").json() == {"is_paused": True}
    assert first.get("/ready").status_code == 503
    body = {"model": "fake", "prompt": [5], "max_tokens": 9, "n": 2, "request_id": "call"}
    calls = [
        pool.submit(generate, first, [5], 9, rid="mine"),
        pool.submit(first.post, "/v1/completions", json=body),
        pool.submit(generate, first, [6], 9, rid="stays"),
    ]
    until(lambda: state_of(second)["num_waiting"] == 4)
    assert error_of(generate(second, [6], rid="mine")) == (400, "InvalidRequest", "rid")
    second.post("/abort_request", json={"rid": "mine"})
    second.post("/abort_requests", json={"request_ids": ["call"]})
    assert calls[0].result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert {c["finish_reason"] for c in calls[1].result().json()["choices"]} == {"abort"}
    second.post("/continue_generation")
    assert calls[2].result().json()["output_ids"] == expected_tokens([6], 9)


def test_a_pause_that_waits_ends_what_runs_and_holds_what_comes_at_every_front(
    pair: tuple[httpx.Client, httpx.Client], pool: ThreadPoolExecutor
) -> None:
    first, second = pair
    second.post("/pause_generation", json={"mode": "in_place"})
    runs = pool.submit(generate, first, [5], 100)
    until(lambda: state_of(second)["num_waiting"] == 1)
    second.post("/continue_generation")
    assert second.post("/pause?mode=wait").json() == {"status": "paused"}
    assert runs.result().json()["output_ids"] == expected_tokens([5], 100)
    comes = [pool.submit(generate, client, [7], 3) for client in pair]
    until(lambda: state_of(second)["num_waiting"] == 2)
    assert not any(each.done() for each in comes)
    second.post("/resume")
    for each in comes:
        assert each.result().json()["output_ids"] == expected_tokens([7], 3)


def test_a_version_has_its_name_in_the_replies_of_every_front(
    pair: tuple[httpx.Client, httpx.Client],
) -> None:
    for number, client in enumerate(pair, 3):
        body = {"model_path": f"/weights/step_{number}", "weight_version": f"the {number}th"}
        assert client.post("/update_weights_from_disk", json=body).json()["success"]
        for other in pair:
            reply = generate(other, [5], 3).json()
            assert reply["output_ids"] == expected_tokens([5], 3, shift=number)
            assert reply["meta_info"]["weight_version"] == f"the {number}th"
            assert other.get("/model_info").json()["weight_version"] == f"the {number}th"
    pair[0].post("/update_weights_from_disk", json={"model_path": "/weights/step_0"})


def test_metrics_count_what_ended_at_every_front(pair: tuple[httpx.Client, httpx.Client]) -> None:
    """Requests of other tests may be reported meanwhile: none of those ends by a stop token."""

    def counted(client: httpx.Client) -> float:
        text = client.get("/metrics").text
        of_stops = re.findall(r"^slipstream_requests_total\{[^}]*stop[^}]*\} (\S+)", text, re.M)
        return sum(map(float, of_stops))

    assert counted(pair[0]) == 0
    body = {
        "input_ids": [5],
        "sampling_params": {"max_new_tokens": 9, "stop_token_ids": expected_tokens([5], 2)[1:]},
    }
    for client in pair:
        reply = client.post("/generate", json=body).json()
        assert reply["meta_info"]["finish_reason"]["type"] == "stop"
    until(lambda: counted(pair[0]) == 2)
    assert counted(pair[1]) == 2


def test_a_client_that_leaves_one_front_ends_its_request_in_the_engine(
    pair: tuple[httpx.Client, httpx.Client], server: ServerProcess
) -> None:
    with client_of(server, "front-1") as leaving:
        body = {"input_ids": [5], "sampling_params": LONG, "stream": True}
        pair[1].post("/pause_generation", json={"mode": "in_place"})
        with leaving.stream("POST", "/generate", json=body):
            until(lambda: state_of(pair[1])["num_waiting"] == 1)
    until(lambda: state_of(pair[1])["num_waiting"] == 0)
    pair[1].post("/continue_generation")


def test_a_port_in_use_is_refused_to_a_second_server(server: ServerProcess) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(AssertionError, match=r"InvalidRequest|cannot bind"):
        ServerProcess(["-c", FAKE.replace("port=0", f"port={port}, http_processes=2")])


def test_a_front_that_ends_frees_what_it_had_and_another_takes_its_place() -> None:
    with (
        fronts_server("num_pages=1000", 'restart="on-failure"') as server,
        client_of(server, "front-2") as stays,
        ThreadPoolExecutor(2) as pool,
    ):
        fronts = pids_of(server)
        free = state_of(stays)["free_pages"]
        stays.post("/pause_generation", json={"mode": "in_place"})
        with client_of(server, "front-1") as dies:
            call = pool.submit(generate, dies, [5], 300)
            kept = pool.submit(generate, stays, [6], 300)
            with client_of(server, "front-2") as looks:
                until(lambda: state_of(looks)["num_waiting"] == 2)
                os.kill(fronts["front1"], signal.SIGKILL)
                with pytest.raises(httpx.HTTPError):
                    call.result()
                until(lambda: state_of(looks)["num_waiting"] == 1)
                looks.post("/continue_generation")
        assert kept.result().json()["output_ids"] == expected_tokens([6], 300)
        with client_of(server, "front-1") as again:
            assert generate(again, [5]).json()["output_ids"] == expected_tokens([5], 4)
            again.post("/flush_cache")
            assert state_of(again)["free_pages"] == free
        # An engine that dies is gone for every front, and the next one serves all.
        with client_of(server, "front-1") as first, client_of(server, "front-2") as looks:
            looks.post("/pause_generation", json={"mode": "in_place"})
            open_calls = [pool.submit(generate, client, [5]) for client in (first, stays)]
            until(lambda: state_of(looks)["num_waiting"] == 2)
            os.kill(fronts["leader"], signal.SIGKILL)
            for open_call in open_calls:
                assert error_of(open_call.result())[:2] == (503, "EngineDead")
            for client in (first, stays):
                until(lambda c=client: generate(c, [5]).status_code == 200)
                assert generate(client, [5]).json()["output_ids"] == expected_tokens([5], 4)
        assert server.terminate() == 0


def test_a_front_that_ends_ends_the_server_where_nothing_is_started_again() -> None:
    with (
        fronts_server() as server,
        client_of(server, "front-2") as stays,
        client_of(server, "front-2") as looks,
        ThreadPoolExecutor(1) as pool,
    ):
        children = pids_of(server)
        looks.post("/pause_generation", json={"mode": "in_place"})
        call = pool.submit(generate, stays, [5])
        until(lambda: state_of(looks)["num_waiting"] == 1)
        os.kill(children["front1"], signal.SIGKILL)
        assert error_of(call.result())[:2] == (503, "EngineDead")
        assert server.process.wait(60) == 1
        server.close()
        assert any("front-1, ended with code -9" in line for line in server.lines)
        assert all(map(gone, children.values()))


@pytest.mark.parametrize("how", ["told", "killed"])
def test_a_server_that_ends_leaves_no_process(how: str) -> None:
    with fronts_server() as server, ThreadPoolExecutor(2) as pool, ExitStack() as opened:
        children = pids_of(server)
        assert sorted(children) == ["front1", "front2", "leader"]
        if how == "killed":
            server.process.kill()
        else:
            clients = [
                opened.enter_context(client_of(server, f"front-{number}")) for number in (1, 2)
            ]
            clients[0].post("/pause_generation", json={"mode": "in_place"})
            calls = [pool.submit(generate, client, [5], 300) for client in clients]
            with client_of(server, "front-1") as looks:
                until(lambda: state_of(looks)["num_waiting"] == 2)
            assert server.terminate() == 0
            for call in calls:
                assert error_of(call.result())[:2] == (503, "EngineDead")
        assert all(map(gone, children.values()))
