"""Routes in replies: SGLang's form on /generate, vLLM's on the routes of its dialect, each against
the fake engine, whose routes are a function of the tokens."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest

from engine.protocol import RouteArray
from rollout.scheduler.routes.reply_fields import decoded_routes
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, events, run, serving
from tests.helpers.mock_routes import fake_routes
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import ids_of

IDS = [5, 6, 7]
FOUR = {"max_new_tokens": 4}
EXPERTS = fake_config("experts", routes=True, max_waiting=4000)
PATHS = ("/v1/completions", "/inference/v1/generate", "/v1/chat/completions")


def wanted(prompt: list[int], count: int = 4) -> RouteArray:
    return fake_routes([*prompt, *expected_tokens(prompt, count)])


async def meta_of(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"input_ids": IDS, "sampling_params": FOUR, "return_routed_experts": True, **fields}
    reply = await server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json()["meta_info"])


def npy(choice: dict[str, Any]) -> RouteArray:
    found: RouteArray = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    return found


def asked(path: str, **fields: Any) -> dict[str, Any]:
    if path == "/inference/v1/generate":
        stream = {"stream": fields.pop("stream", False)}
        return {"token_ids": IDS, "sampling_params": {"max_tokens": 4, **fields}, **stream}
    if path == "/v1/completions":
        return {"prompt": IDS, "max_tokens": 4, "return_routed_experts": True, **fields}
    messages = [{"role": "user", "content": "ab"}]
    return {"messages": messages, "max_tokens": 4, "return_routed_experts": True, **fields}


def test_a_reply_has_them_as_sglang_has_them() -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            meta = await meta_of(server)
            flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
            np.testing.assert_array_equal(flat.reshape(6, 3, 2), wanted(IDS))
            assert (flat.reshape(6, 3, 2)[:, 0] == 0).all(), "a layer without experts"
            assert meta["routed_experts_dtype"] == "int32"
            assert meta["routed_experts_shape"] == [6, 3, 2]
            assert meta["routed_experts_start_len"] == 0

    run(test)


@pytest.mark.parametrize("dtype", ["int32", "uint16", "uint8"])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_tail_that_is_asked_for_in_fewer_bytes(dtype: str, start: int) -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            fields = {"routed_experts_start_len": start, "routed_experts_dtype": dtype}
            meta = await meta_of(server, **fields)
            found = decoded_routes(meta)
            assert found is not None and found.dtype == dtype
            np.testing.assert_array_equal(found, wanted(IDS)[start:])

    run(test)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_stream_has_them_in_its_last_frame(incremental: bool) -> None:
    async def test() -> None:
        options = {"incremental_streaming_output": incremental}
        async with serving(engine=EXPERTS, **options) as server:
            body = {"input_ids": IDS, "sampling_params": FOUR, "stream": True}
            reply = await server.post("/generate", {**body, "return_routed_experts": True})
            *frames, last, done = events(reply.text)
            assert done is None and len(frames) >= 3
            assert not any("routed_experts" in frame["meta_info"] for frame in frames)
            np.testing.assert_array_equal(decoded_routes(last["meta_info"]), wanted(IDS))

    run(test)


def test_samples_and_batches_have_their_own() -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            batch = {"input_ids": [IDS, [8, 9]], "sampling_params": {**FOUR, "n": 2}}
            batch["return_routed_experts"] = [True, False]
            found = (await server.post("/generate", batch)).json()
            for reply in found[:2]:
                np.testing.assert_array_equal(decoded_routes(reply["meta_info"]), wanted(IDS))
            assert all("routed_experts" not in reply["meta_info"] for reply in found[2:])

    run(test)


def test_a_stop_string_ends_them_with_the_text() -> None:
    text_ids = ids_of("abc")
    output = expected_tokens(text_ids, 12)

    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            whole = {"text": "abc", "sampling_params": {"max_new_tokens": 12}}
            said = (await server.post("/generate", whole)).json()["text"]
            sampling = {"max_new_tokens": 12, "stop": said[3:5]}
            for stream in (False, True):
                body = {"text": "abc", "sampling_params": sampling, "stream": stream}
                reply = await server.post("/generate", {**body, "return_routed_experts": True})
                last = events(reply.text)[-2] if stream else reply.json()
                assert last["meta_info"]["finish_reason"]["matched"] == said[3:5]
                tokens = [*text_ids, *output[:5]]
                np.testing.assert_array_equal(
                    decoded_routes(last["meta_info"]), fake_routes(tokens)
                )

    run(test)


def test_what_was_given_is_computed_for_its_routes() -> None:
    output = expected_tokens(IDS, 4)

    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            # Over with the tokens that it came with; then one that goes on.
            ended = await meta_of(server, output_ids=output)
            np.testing.assert_array_equal(decoded_routes(ended), wanted(IDS))
            longer = {"sampling_params": {"max_new_tokens": 6}, "routed_experts_start_len": 6}
            rest = await meta_of(server, output_ids=output, **longer)
            np.testing.assert_array_equal(decoded_routes(rest), wanted(IDS, 6)[6:])
            nothing = await meta_of(server, sampling_params={"max_new_tokens": 0})
            np.testing.assert_array_equal(decoded_routes(nothing), fake_routes(IDS))

    run(test)


def test_a_session_has_those_of_all_its_turns() -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            session = (await server.post("/sessions", {})).json()["id"]
            first = expected_tokens(IDS, 4)
            await meta_of(server, session=session)
            tokens = [*IDS, *first, 9]
            tokens += expected_tokens(tokens, 4)
            fields = {"input_ids": [9], "session": session}
            meta = await meta_of(server, **fields, routed_experts_start_len=6)
            np.testing.assert_array_equal(decoded_routes(meta), fake_routes(tokens)[6:])
            body = {**fields, "sampling_params": FOUR, "return_routed_experts": True}
            late = await server.post("/generate", {**body, "routed_experts_start_len": 99})
            assert late.status_code == 400
            assert late.json()["error"]["field"] == "routed_experts_start_len"

    run(test)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("start", [0, 2])
def test_choices_have_them_as_vllm_has_them(path: str, start: int) -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            body = asked(path, n=2, **({"routed_experts_prompt_start": start} if start else {}))
            reply = await server.post(path, body)
            assert reply.status_code == 200, reply.text
            prompt = server.link.requests[-1].prompt_ids.tolist()
            for choice in reply.json()["choices"]:
                found = npy(choice)
                assert found.dtype == np.uint8
                np.testing.assert_array_equal(found, wanted(prompt)[start:])

    run(test)


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_of_choices_ends_with_them(path: str) -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            reply = await server.post(path, asked(path, stream=True))
            prompt = server.link.requests[-1].prompt_ids.tolist()
            choices = [frame["choices"][0] for frame in events(reply.text) if frame]
            *others, last = choices
            assert not any("routed_experts" in choice for choice in others)
            np.testing.assert_array_equal(npy(last), wanted(prompt))

    run(test)


def test_who_gets_them_unasked() -> None:
    async def test() -> None:
        async with serving(engine=EXPERTS) as server:
            plain = {"prompt": IDS, "max_tokens": 4}
            reply = await server.post("/v1/completions", plain)
            assert "routed_experts" not in reply.json()["choices"][0]
            # As vLLM returns them, unless told not to.
            path = "/inference/v1/generate"
            reply = await server.post(path, {**asked(path), "return_routed_experts": False})
            assert "routed_experts" not in reply.json()["choices"][0]
            assert (await server.get("/server_info")).json()["enable_return_routed_experts"]
        async with serving(engine=fake_config("experts")) as server:
            reply = await server.post(path, asked(path))
            assert "routed_experts" not in reply.json()["choices"][0]
            assert not (await server.get("/server_info")).json()["enable_return_routed_experts"]

    run(test)


BAD = [
    ("fake", True, {}, "return_routed_experts", "has no experts"),
    ("experts", False, {}, "return_routed_experts", "--enable-return-routed-experts"),
    ("experts", True, {"routed_experts_start_len": 4}, "routed_experts_start_len", "[0, 3]"),
    ("experts", True, {"routed_experts_start_len": -1}, "routed_experts_start_len", "[0, 3]"),
    ("experts", True, {"routed_experts_dtype": "int8"}, "routed_experts_dtype", "int8"),
]


@pytest.mark.parametrize(("model", "routes", "fields", "field", "said"), BAD)
def test_what_cannot_be_returned_is_refused(
    model: str, routes: bool, fields: dict[str, Any], field: str, said: str
) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model, routes=routes and model != "fake")) as server:
            body = {"input_ids": IDS, "sampling_params": FOUR, "return_routed_experts": True}
            reply = await server.post("/generate", {**body, **fields})
            error = reply.json()["error"]
            assert reply.status_code == 400 and error["field"] == field, error
            assert said in error["message"]
            if fields:
                return
            body = {"prompt": IDS, "return_routed_experts": True}
            reply = await server.post("/v1/completions", body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
            opened = await server.post("/rollouts", {"return_routed_experts": True})
            assert (opened.status_code, opened.json()["error"]["field"]) == (400, field)

    run(test)
