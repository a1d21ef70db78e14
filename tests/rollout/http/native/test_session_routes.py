"""Sessions over HTTP: turns of /generate, and what is refused by name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.protocol import Reply, Stop
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, events, run, serving, until
from tests.helpers.tiny_tokenizer import ids_of


async def turn(
    server: Server, session: str, ids: list[int], count: int = 5, **more: Any
) -> dict[str, Any]:
    body = {
        "input_ids": ids,
        "session": session,
        "sampling_params": {"max_new_tokens": count, **more.pop("sampling", {})},
        **more,
    }
    reply = await server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def tokens(server: Server, session: str) -> list[int]:
    return list((await server.get(f"/sessions/{session}")).json()["token_ids"])


def test_a_turn_goes_on_from_the_tokens_before_it() -> None:
    async def test() -> None:
        async with serving() as server:
            made = (await server.post("/sessions", {"max_tokens": 100})).json()
            session = made["id"]
            assert (made["num_tokens"], made["max_tokens"], made["busy"]) == (0, 100, False)
            have: list[int] = []
            for number, ids in enumerate(([5, 6, 7], [8], [9, 10])):
                found = await turn(server, session, ids, return_logprob=True)
                meta = found["meta_info"]
                assert found["output_ids"] == expected_tokens([*have, *ids], 5)
                assert meta["session"] == {"id": session, "start": len(have)}
                assert meta["prompt_tokens"] == len(have) + len(ids)
                assert meta["cached_tokens"] == max(0, len(have) - 1)
                assert len(meta["output_token_logprobs"]) == 5
                have = [*have, *ids, *found["output_ids"]]
                state = (await server.get(f"/sessions/{session}")).json()
                assert state["token_ids"] == have and state["num_turns"] == number + 1
                assert state["held_tokens"] == len(have) - 1
            info = (await server.get("/server_info")).json()
            assert info.get("num_sessions", 1) == 1
            await turn(server, session, [3], session_at=8)
            assert (await tokens(server, session))[:9] == [*have[:8], 3]
            closed = await server.http.delete(f"/sessions/{session}")
            assert closed.json() == {"id": session, "closed": True}

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_where_the_session_ends(stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sessions", {"session_id": "s"})
            reply = expected_tokens([5, 6], 30)
            stop = "".join(chr(33 + token) for token in reply[3:5])
            body = {
                "input_ids": [5, 6],
                "session": "s",
                "stream": stream,
                "sampling_params": {"max_new_tokens": 5, "stop": stop},
            }
            await server.post("/generate", body)
            assert await tokens(server, "s") == [5, 6, *reply[:5]]
            await turn(server, "s", [7], count=3)
            # The engine hears of the stop too late: it has gone on to an end of its own.
            late = iter([Reply()])
            server.link.answers[Stop] = lambda _: next(late, None)
            have = await tokens(server, "s")
            more = expected_tokens([*have, *ids_of("q")], 9)
            end = more.index(more[2]) + 1
            assert end < 9
            sampling = {"max_new_tokens": 9, "stop": chr(33 + more[2])}
            body = {**body, "input_ids": ids_of("q"), "sampling_params": sampling}
            await server.post("/generate", body)
            assert await tokens(server, "s") == [*have, *ids_of("q"), *more[:end]]

    run(test)


def test_a_second_turn_at_the_same_time_is_refused() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sessions", {"session_id": "s"})
            first = asyncio.create_task(turn(server, "s", [5], count=40))
            await until(lambda: bool(server.link.requests))
            assert (await server.get("/sessions/s")).json()["busy"]
            busy = await server.post("/generate", {"input_ids": [7], "session": "s"})
            assert (busy.status_code, busy.json()["error"]["type"]) == (409, "SessionBusy")
            assert busy.json()["error"]["field"] == "session"
            assert (await first)["output_ids"] == expected_tokens([5], 40)

    run(test)


def test_a_turn_whose_client_leaves_never_was() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sessions", {"session_id": "s"})
            await turn(server, "s", [5])
            before = await tokens(server, "s")
            server.link.stalled = True
            asked = asyncio.create_task(turn(server, "s", [6]))
            await until(lambda: len(server.link.requests) == 2)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            server.link.stalled = False
            assert await tokens(server, "s") == before
            await turn(server, "s", [6])
            assert len(await tokens(server, "s")) == len(before) + 6

    run(test)


def test_sglangs_names_for_the_same() -> None:
    async def test() -> None:
        async with serving() as server:
            opened = await server.post("/open_session", {"capacity_of_str_len": 50_000})
            session = opened.json()
            assert isinstance(session, str)
            twice = await server.post(
                "/open_session", {"capacity_of_str_len": 9, "session_id": session}
            )
            assert twice.status_code == 400
            await turn(server, "", [5, 6], session_params={"id": session, "rid": None})
            assert len(await tokens(server, session)) == 7
            for part in (
                {"rid": "x"},
                {"offset": 1},
                {"replace": True},
                {"drop_previous_output": True},
            ):
                body = {"input_ids": [5], "session_params": {"id": session, **part}}
                reply = await server.post("/generate", body)
                assert reply.json()["error"]["field"] == f"session_params.{next(iter(part))}"
            assert (await server.post("/close_session", {"session_id": session})).status_code == 200
            assert (await server.post("/close_session", {"session_id": session})).status_code == 404

    run(test)


def test_refusals_name_the_session() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sessions", {"session_id": "s", "max_tokens": 20})

            async def refused(status: int, kind: str, field: str, **body: Any) -> None:
                body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2}, **body}
                reply = await server.post("/generate", body)
                error = reply.json()["error"]
                found = (reply.status_code, error["type"], error["field"])
                assert found == (status, kind, field), error

            await refused(404, "UnknownSession", "session", session="other")
            await refused(404, "UnknownSession", "session", session="a/../b")
            await refused(400, "ContextTooLong", "session", session="s", input_ids=[5] * 20)
            await refused(400, "InvalidRequest", "session_at", session="s", session_at=4)
            await refused(400, "InvalidRequest", "session_at", session_at=0)
            await refused(400, "InvalidRequest", "output_ids", session="s", output_ids=[1])
            await refused(400, "InvalidRequest", "hold_at", session="s", hold_at=1)
            await refused(400, "InvalidRequest", "n", session="s", sampling_params={"n": 2})
            await refused(400, "InvalidRequest", "session", session=5)
            for body in ({"max_tokens": -1}, {"timeout_s": 0}, {"timeout_s": 1e9}, {"a": 1}):
                assert (await server.post("/sessions", body)).status_code == 400, body
            for path in ("/sessions/none", "/sessions/%00", f"/sessions/{'x' * 3000}"):
                assert (await server.get(path)).status_code in (400, 404)
            await turn(server, "s", [5], count=100)
            assert len(await tokens(server, "s")) == 20
            await server.http.delete("/sessions/s")
            await refused(404, "UnknownSession", "session", session="s")

    run(test)


def test_released_memory_costs_the_kv_and_an_engine_that_restarts_the_session() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sessions", {"session_id": "s"})
            await turn(server, "s", [5, 6, 7])
            for path in ("/release_memory_occupation", "/resume_memory_occupation"):
                done = await server.post(path, {"tags": ["kv_cache"]})
                assert done.status_code == 200, done.text
            found = await turn(server, "s", [8])
            assert found["meta_info"]["cached_tokens"] == 0
            server.link.die()
            await server.engine.restart(server.another_engine(), start_s=60)
            reply = await server.post("/generate", {"input_ids": [5], "session": "s"})
            error = reply.json()["error"]
            assert (reply.status_code, error["type"], error["field"]) == (
                404,
                "UnknownSession",
                "session",
            )
            assert "started again" in error["message"]

    run(test)


def test_a_session_of_one_server_is_unknown_to_another() -> None:
    async def test() -> None:
        async with serving() as one, serving() as other:
            await one.post("/sessions", {"session_id": "s"})
            await turn(one, "s", [5])
            assert (await other.get("/sessions/s")).json()["error"]["type"] == "UnknownSession"

    run(test)


def test_turns_stream_like_any_request() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/sessions", {"session_id": "s"})
            await turn(server, "s", [5, 6])
            body = {
                "input_ids": [7],
                "session": "s",
                "stream": True,
                "sampling_params": {"max_new_tokens": 4},
            }
            reply = await server.post("/generate", body)
            have = [5, 6, *expected_tokens([5, 6], 5), 7]
            last = [frame for frame in events(reply.text) if frame][-1]
            assert last["output_ids"] == expected_tokens(have, 4)
            assert last["meta_info"]["session"] == {"id": "s", "start": 7}

    run(test)
