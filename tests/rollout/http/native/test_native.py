"""POST /generate against the fake engine: singles, batches, streams, and every refusal."""

import asyncio
import json
from typing import Any

import pytest

from engine.protocol import Abort, Pause, Resume
from tests.helpers.fake_executor import POISON, expected_tokens
from tests.helpers.http_app import Server, events, run, serving, until
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

FOUR = {"max_new_tokens": 4}


def test_one_request_in_text() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"text": "abc", "sampling_params": FOUR, "return_logprob": True}
            reply = await server.post("/generate", body)
            found = reply.json()
            ids = expected_tokens(ids_of("abc"), 4)
            assert reply.status_code == 200
            assert found["output_ids"] == ids
            assert found["text"] == tiny_tokenizer().decode(ids)
            meta = found["meta_info"]
            assert meta["finish_reason"] == {"type": "length", "length": 4}
            assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, 4)
            assert meta["weight_version"] == "0"
            assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]
            entries = meta["output_token_logprobs"]
            assert [entry[1] for entry in entries] == ids
            assert entries[0][0] == pytest.approx(-ids[0] / 100)

    run(test)


def test_ids_in_and_out_without_a_tokenizer() -> None:
    async def test() -> None:
        async with serving(ids_only=True) as server:
            body = {"input_ids": [5, 6], "sampling_params": FOUR, "return_prompt_token_ids": True}
            found = (await server.post("/generate", body)).json()
            assert found["output_ids"] == expected_tokens([5, 6], 4)
            assert found["prompt_token_ids"] == [5, 6]
            assert "text" not in found
            refused = await server.post("/generate", {"text": "abc"})
            assert refused.status_code == 400
            assert refused.json()["error"]["field"] == "text"

    run(test)


def test_samples_of_one_prompt_have_seeds_of_their_own() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [5], "rid": "g", "sampling_params": {**FOUR, "n": 3}}
            found = (await server.post("/generate", body)).json()
            assert [reply["index"] for reply in found] == [0, 1, 2]
            assert [reply["meta_info"]["id"] for reply in found] == ["g-0", "g-1", "g-2"]
            seeds = {request.seed for request in server.link.requests}
            assert len(seeds) == 3

    run(test)


def test_a_batch_has_its_lists_in_order() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {
                "input_ids": [[1], [2, 3], [4]],
                "rid": ["a", "b", "c"],
                "sampling_params": [FOUR, {"max_new_tokens": 2, "n": 2}, FOUR],
                "return_logprob": [True, False, False],
            }
            found = (await server.post("/generate", body)).json()
            prompts, counts = [[1], [2, 3], [2, 3], [4]], [4, 2, 2, 4]
            expected = [expected_tokens(p, n) for p, n in zip(prompts, counts, strict=True)]
            assert [reply["output_ids"] for reply in found] == expected
            ids = [reply["meta_info"]["id"] for reply in found]
            assert ids == ["a", "b-0", "b-1", "c"]
            assert [reply["index"] for reply in found] == [0, 1, 2, 3]
            logprobs = ["output_token_logprobs" in reply["meta_info"] for reply in found]
            assert logprobs == [True, False, False, False]

    run(test)


def test_a_batch_of_1024() -> None:
    async def test() -> None:
        async with serving(engine=fake_config(max_waiting=4000, num_pages=4096)) as server:
            prompts = [[1 + i % 70, 2, i % 7] for i in range(1024)]
            body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 2}}
            found = (await server.post("/generate", body)).json()
            assert [reply["output_ids"] for reply in found] == [
                expected_tokens(prompt, 2) for prompt in prompts
            ]

    run(test)


@pytest.mark.parametrize(
    "body,kind,field",
    [
        ({}, "InvalidRequest", "text, input_ids"),
        ({"text": "a", "input_ids": [1]}, "InvalidRequest", "text, input_ids"),
        ({"input_ids": [4000]}, "InvalidRequest", "input_ids"),
        ({"input_ids": list(range(90)) * 6}, "ContextTooLong", "input_ids"),
        ({"text": "a", "temperatur": 1}, "InvalidRequest", "temperatur"),
        ({"text": "a", "regex": "x+"}, "InvalidRequest", "regex"),
        (
            {"text": "a", "sampling_params": {"json_schema": "{}", "regex": "x+"}},
            "InvalidRequest",
            "sampling_params.regex",
        ),
        (
            {"text": "a", "sampling_params": {"top_p": "x"}},
            "InvalidRequest",
            "sampling_params.top_p",
        ),
        ({"text": []}, "InvalidRequest", "text"),
        ({"text": ["a", "b"], "rid": ["x"]}, "InvalidRequest", "rid"),
        ({"text": ["a", "b"], "rid": "x"}, "InvalidRequest", "rid"),
        ({"text": ["a", 3]}, "InvalidRequest", "[1].text"),
        (
            {"input_ids": [[1], [2]], "sampling_params": [{}, {"temperature": -1}]},
            "InvalidRequest",
            "[1].temperature",
        ),
        (
            {"input_ids": [[1], [2]], "sampling_params": [{}, {"max_tokens": 1}]},
            "InvalidRequest",
            "[1].sampling_params.max_tokens",
        ),
    ],
)
def test_a_bad_request_names_its_field_and_nothing_is_submitted(
    body: dict[str, Any], kind: str, field: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/generate", body)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, 400)
            assert (error["type"], error["field"]) == (kind, field)
            if field.startswith("["):
                assert error["message"].startswith("item 1: ")
            assert server.link.requests == []

    run(test)


def test_bytes_that_are_no_json() -> None:
    async def test() -> None:
        async with serving() as server:
            for content in (b"{", b"\xff", b"[1]", b'"x"'):
                reply = await server.http.post("/generate", content=content)
                assert reply.status_code == 400
                assert reply.json()["error"]["type"] == "InvalidRequest"

    run(test)


def test_defaults_that_clients_of_the_dialect_send() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {
                "input_ids": [5],
                "image_data": [],
                "return_routed_experts": False,
                "lora_path": None,
                "routing_key": "k",
                "return_hidden_states": False,
                "sampling_params": {**FOUR, "regex": None, "json_schema": "", "stop": None},
            }
            reply = await server.post("/generate", body)
            assert reply.json()["output_ids"] == expected_tokens([5], 4)

    run(test)


def test_a_stream_is_cumulative() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"text": "abc", "stream": True, "sampling_params": FOUR, "return_logprob": True}
            reply = await server.post("/generate", body)
            assert reply.headers["content-type"].startswith("text/event-stream")
            *frames, done = events(reply.text)
            ids = expected_tokens(ids_of("abc"), 4)
            assert done is None
            assert [frame["output_ids"] for frame in frames] == [ids[:n] for n in (1, 2, 3, 4)]
            text = tiny_tokenizer().decode(ids)
            assert [frame["text"] for frame in frames] == [text[:n] for n in (1, 2, 3, 4)]
            reasons = [frame["meta_info"]["finish_reason"] for frame in frames]
            assert reasons == [None, None, None, {"type": "length", "length": 4}]
            counts = [len(frame["meta_info"]["output_token_logprobs"]) for frame in frames]
            assert counts == [1, 2, 3, 4]

    run(test)


def test_a_stream_of_increments() -> None:
    async def test() -> None:
        async with serving(incremental_streaming_output=True) as server:
            body = {"text": "abc", "stream": True, "sampling_params": {**FOUR, "n": 2}}
            *frames, _ = events((await server.post("/generate", body)).text)
            ids = expected_tokens(ids_of("abc"), 4)
            for index in (0, 1):
                own = [frame for frame in frames if frame["index"] == index]
                assert [frame["output_ids"] for frame in own] == [[token] for token in ids]
                assert "".join(frame["text"] for frame in own) == tiny_tokenizer().decode(ids)
                counts = [frame["meta_info"]["completion_tokens"] for frame in own]
                assert counts == [1, 2, 3, 4]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_at_its_last_token(stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            ids = expected_tokens(ids_of("abc"), 40)
            text = tiny_tokenizer().decode(ids)
            stop = text[5:7]
            sampling = {"max_new_tokens": 40, "stop": [stop]}
            body = {"text": "abc", "stream": stream, "sampling_params": sampling}
            reply = await server.post("/generate", body)
            found = events(reply.text)[-2] if stream else reply.json()
            end = text.find(stop)
            assert found["text"] == text[:end]
            assert found["output_ids"] == ids[: end + 2]
            reason = found["meta_info"]["finish_reason"]
            assert reason == {"type": "stop", "matched": stop}
            if stream:
                texts = [frame["text"] for frame in events(reply.text)[:-1]]
                assert all(text.startswith(shown) for shown in texts)

    run(test)


def test_an_id_in_use_is_refused_and_the_first_goes_on() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            body = {"input_ids": [5], "rid": "same", "sampling_params": FOUR}
            first = asyncio.create_task(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 1)
            second = await server.post("/generate", body)
            assert second.status_code == 400
            assert second.json()["error"]["field"] == "rid"
            await server.post("/continue_generation")
            assert (await first).json()["output_ids"] == expected_tokens([5], 4)

    run(test)


@pytest.mark.parametrize(
    ("path", "field", "first", "second"),
    [
        ("/generate", "rid", {"input_ids": [5]}, {"input_ids": [6], "stream": True}),
        ("/v1/completions", "request_id", {"prompt": [5]}, {"prompt": [6], "stream": True}),
        ("/v1/completions", "request_id", {"prompt": [5], "n": 2}, {"prompt": [6]}),
        ("/v1/completions", "request_id", {"prompt": [5]}, {"prompt": [6], "n": 2, "stream": True}),
    ],
)
def test_an_id_in_use_is_refused_with_a_status(
    path: str, field: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            open_call = asyncio.create_task(server.post(path, {**first, field: "same"}))
            await until(lambda: server.engine.num_open > 0)
            reply = await asyncio.wait_for(server.post(path, {**second, field: "same"}), 60)
            assert reply.status_code == 400
            assert reply.json()["error"]["field"] == field
            await server.post("/abort_requests", {"request_ids": ["same"]})
            await until(lambda: server.engine.num_open == 0)
            assert (await open_call).status_code == 200
            # The id is free again.
            await server.post("/continue_generation")
            assert (await server.post(path, {**second, field: "same"})).status_code == 200

    run(test)


def test_an_id_that_comes_twice_in_a_batch_is_refused_with_a_status() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [[5], [6]], "rid": ["a", "a"], "stream": True}
            reply = await server.post("/generate", body)
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, "rid")

    run(test)


def test_ids_of_samples_take_none_of_another_client() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            many = {"input_ids": [5], "rid": "q", "sampling_params": {**FOUR, "n": 2}}
            first = asyncio.ensure_future(server.post("/generate", many))
            await until(lambda: server.engine.num_open == 2)
            calls = [
                asyncio.ensure_future(server.post(path, {name: "q-0", **body}))
                for path, name, body in (
                    ("/generate", "rid", {"input_ids": [6], "sampling_params": FOUR}),
                    ("/v1/completions", "request_id", {"prompt": "ab", "max_tokens": 2}),
                )
            ]
            await until(lambda: server.engine.num_open == 4)
            await server.post("/continue_generation")
            assert [each["meta_info"]["id"] for each in (await first).json()] == ["q-0", "q-1"]
            own, other = [(await call).json() for call in calls]
            assert own["meta_info"]["id"] == "q-0"
            assert own["output_ids"] == expected_tokens([6], 4)
            assert other["choices"][0]["text"]
            for path, body, field in (
                ("/generate", {"input_ids": [6], "rid": "q\0000"}, "rid"),
                ("/v1/completions", {"prompt": "ab", "request_id": "q\0000"}, "request_id"),
            ):
                error = (await server.post(path, body)).json()["error"]
                assert (error["code"], error["field"]) == (400, field)

    run(test)


@pytest.mark.parametrize("name", ["q", "q-", "q-1"])
def test_samples_are_aborted_by_the_ids_that_replies_show(name: str) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            many = {"input_ids": [5], "rid": "q", "sampling_params": {**FOUR, "n": 2}}
            call = asyncio.ensure_future(server.post("/generate", many))
            await until(lambda: server.engine.num_open == 2)
            await server.post("/abort_request", {"rid": name})
            await server.post("/continue_generation")
            ends = [e["meta_info"]["finish_reason"]["type"] for e in (await call).json()]
            assert ends == (["length", "abort"] if name == "q-1" else ["abort", "abort"])

    run(test)


def test_a_full_queue_is_503() -> None:
    async def test() -> None:
        async with serving(engine=fake_config(max_waiting=2)) as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            body = {"input_ids": [[5]] * 2, "sampling_params": FOUR}
            first = asyncio.ensure_future(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 2)
            reply = await server.post("/generate", body)
            assert reply.status_code == 503
            assert reply.json()["error"]["type"] == "QueueFull"
            await until(lambda: server.engine.num_open == 2)
            await server.post("/continue_generation")
            assert len((await first).json()) == 2

    run(test)


def test_a_failed_step_comes_back_as_an_abort_with_its_error() -> None:
    async def test() -> None:
        async with serving() as server:
            found = (await server.post("/generate", {"input_ids": [POISON]})).json()
            reason = found["meta_info"]["finish_reason"]
            assert (reason["type"], reason["error"]) == ("abort", "OutOfMemory")
            body = {"input_ids": [5], "sampling_params": FOUR}
            assert (await server.post("/generate", body)).status_code == 200

    run(test)


async def leave(server: Server, body: dict[str, Any]) -> None:
    """POST /generate, and close the connection once the sequences run."""
    left = asyncio.Event()
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("server", 80),
        "client": ("client", 1),
        "root_path": "",
    }
    task = asyncio.create_task(server.app(scope, receive, send))
    await until(lambda: server.engine.num_open > 0)
    left.set()
    await task


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_requests(stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            server.commands()
            body = {"input_ids": [[5], [6], [7]], "stream": stream}
            await leave(server, body)
            rids = sorted(request.rid for request in server.link.requests)
            assert server.commands() == [Abort(rids=rids, message="the client left")]
            state = await server.engine.state(max_age_s=0)
            assert (state.num_running, state.num_waiting) == (0, 0)

            await leave(server, {"input_ids": [5], "rid": "mine", "stream": stream})
            assert server.commands() == [Abort(rids=["mine"], message="the client left")]

    run(test)


def test_requests_wait_while_paused() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/command", {"type": "pause", "mode": "keep"})
            body = {"input_ids": [5], "sampling_params": FOUR}
            task = asyncio.create_task(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 1)
            await asyncio.sleep(0.02)
            assert not task.done()
            await server.post("/command", {"type": "resume"})
            assert (await task).json()["output_ids"] == expected_tokens([5], 4)
            assert server.commands() == [Pause(mode="keep"), Resume()]

    run(test)


def test_a_dead_engine_answers_everyone() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/command", {"type": "pause", "mode": "keep"})
            body = {"input_ids": [5], "sampling_params": FOUR}
            waiting = asyncio.create_task(server.post("/generate", body))
            stream = asyncio.create_task(server.post("/generate", {**body, "stream": True}))
            await until(lambda: server.engine.num_open == 2)
            server.link.die()
            reply = await waiting
            assert reply.status_code == 503
            assert reply.json()["error"]["type"] == "EngineDead"
            error, done = events((await stream).text)
            assert (error["error"]["type"], done) == ("EngineDead", None)
            for path in ("/health", "/ready", "/health_generate", "/server_info", "/metrics"):
                assert (await server.get(path)).status_code == 503, path
            assert (await server.post("/generate", body)).status_code == 503
            assert (await server.post("/pause_generation")).status_code == 503

    run(test)
