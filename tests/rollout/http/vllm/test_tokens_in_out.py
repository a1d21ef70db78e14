"""vLLM's routes of ids: /inference/v1/generate, /tokenize, /detokenize and rendered chats."""

import json
from typing import Any

import pytest

from rollout.text.token_bytes import spelled
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import run, serving
from tests.helpers.tiny_tokenizer import BOS_ID, ids_of, tiny_tokenizer

PATH = "/inference/v1/generate"


def body(**sampling: Any) -> dict[str, Any]:
    return {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, **sampling}}


def test_ids_come_back_with_their_logprobs_and_no_text() -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            reply = (await server.post(PATH, body(logprobs=2, n=2))).json()
            expected = expected_tokens([1, 2, 3], 4)
            assert reply["model"] == "mine"
            assert [choice["index"] for choice in reply["choices"]] == [0, 1]
            for choice in reply["choices"]:
                assert choice["token_ids"] == expected
                assert "text" not in choice
                entries = choice["logprobs"]["content"]
                assert [entry["token"] for entry in entries] == [f"token_id:{t}" for t in expected]
                for entry, token in zip(entries, expected, strict=True):
                    assert entry["logprob"] == pytest.approx(-token / 100)
                    assert len(entry["top_logprobs"]) == 2
            assert reply["usage"]["completion_tokens"] == 8
            bare = (await server.post(PATH, body())).json()
            assert bare["choices"][0]["logprobs"] is None
            assert bare["prompt_logprobs"] is None

    run(test)


def test_it_samples_as_completions_do() -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 7, "stop_token_ids": [9]}

    async def test() -> None:
        async with serving() as server:
            await server.post(PATH, {**body(**sampling), "cache_salt": "v3", "priority": 2})
            again = {"prompt": [1, 2, 3], "max_tokens": 4, "cache_salt": "v3", "priority": 2}
            await server.post("/v1/completions", again | sampling)
            first, second = server.link.requests
            assert first.sampling == second.sampling
            assert (first.seed, first.salt, first.priority) == (second.seed, "v3", 2)
            assert first.stop_ids == second.stop_ids

    run(test)


def test_prompt_logprobs_are_those_of_the_one_prompt() -> None:
    async def test() -> None:
        async with serving() as server:
            reply = (await server.post(PATH, body(prompt_logprobs=1))).json()
            first, *others = reply["prompt_logprobs"]
            assert first is None
            assert [row[str(token)]["logprob"] for row, token in zip(others, (2, 3), strict=True)]

    run(test)


def test_a_stream() -> None:
    async def test() -> None:
        async with serving() as server:
            asked = {**body(logprobs=0), "stream": True, "stream_options": {"include_usage": True}}
            text = (await server.post(PATH, asked)).text
            *frames, done = [line[6:] for line in text.splitlines() if line]
            assert done == "[DONE]"
            *parts, last = map(json.loads, frames)
            choices = [part["choices"][0] for part in parts]
            tokens = [token for choice in choices for token in choice["token_ids"]]
            assert tokens == expected_tokens([1, 2, 3], 4)
            assert choices[-1]["finish_reason"] == "length"
            assert last["usage"]["completion_tokens"] == 4

    run(test)


@pytest.mark.parametrize(
    "change,kind,field",
    [
        ({"token_ids": []}, "InvalidRequest", "token_ids"),
        ({"token_ids": "text"}, "InvalidRequest", "token_ids"),
        ({"token_ids": [[1], [2]]}, "InvalidRequest", "token_ids"),
        ({"token_ids": list(range(5000))}, "ContextTooLong", "token_ids"),
        ({"token_ids": [1, -1]}, "InvalidRequest", "token_ids"),
        ({"features": {"a": 1}}, "UnsupportedOption", "features"),
        ({"kv_transfer_params": {"a": 1}}, "UnsupportedOption", "kv_transfer_params"),
        ({"sampling_params": {"max_tokens": -1}}, "InvalidRequest", "max_tokens"),
        ({"sampling_params": {"stream": True}}, "InvalidRequest", "sampling_params.stream"),
        ({"sampling_params": {"echo": True}}, "InvalidRequest", "sampling_params.echo"),
        (
            {"sampling_params": {"structured_outputs": {"regex": "("}}},
            "InvalidRequest",
            "structured_outputs.regex",
        ),
    ],
)
def test_what_is_refused(change: dict[str, Any], kind: str, field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(PATH, body() | change)
            assert reply.status_code == 400
            error = reply.json()["error"]
            assert (error["type"], error["field"]) == (kind, field), error
            assert not server.link.requests

    run(test)


def test_nulls_and_hints_mean_nothing() -> None:
    async def test() -> None:
        async with serving() as server:
            hints = {"output_kind": 2, "detokenize": False, "flat_logprobs": True, "stop": None}
            hints |= {"priority": None, "echo": False, "model": ""}
            asked = {**body(**hints, seed=None), "features": None, "request_id": None}
            assert (await server.post(PATH, asked)).status_code == 200

    run(test)


def test_text_becomes_ids_and_ids_text() -> None:
    async def test() -> None:
        async with serving(tokenizer=tiny_tokenizer(add_bos=True)) as server:
            reply = (await server.post("/tokenize", {"prompt": "ab"})).json()
            assert reply == {
                "count": 3,
                "max_model_len": 512,
                "tokens": [BOS_ID, *ids_of("ab")],
                "token_strs": None,
            }
            asked = {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
            reply = (await server.post("/tokenize", asked)).json()
            assert (reply["tokens"], reply["token_strs"]) == (ids_of("ab"), ["a", "b"])
            asked = {"tokens": [BOS_ID, *ids_of("ab")]}
            whole = (await server.post("/detokenize", asked)).json()
            assert whole["prompt"] == whole["text"] == "<|bos|>ab"

    run(test)


def test_strings_of_tokens_keep_what_a_token_alone_has_no_text_for() -> None:
    async def test() -> None:
        async with serving() as server:
            asked = {"prompt": "a\U0001f600", "return_token_strs": True}
            reply = (await server.post("/tokenize", asked)).json()
            raw = [tiny_tokenizer().token_bytes(token) for token in reply["tokens"]]
            assert b"".join(raw) == asked["prompt"].encode()
            assert reply["token_strs"] == [spelled(each) for each in raw]
            assert "\ufffd" not in "".join(reply["token_strs"])

    run(test)


def test_null_messages_are_no_messages() -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/tokenize", {"prompt": "ab", "messages": None})
            assert reply.json()["tokens"] == ids_of("ab")

    run(test)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_the_text_of_another_model_is_not_served(path: str, asked: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            reply = await server.post(path, {**asked, "model": "nope"})
            assert (reply.status_code, reply.json()["error"]["field"]) == (404, "model")
            for name in ("mine", None, ""):
                assert (await server.post(path, {**asked, "model": name})).status_code == 200

    run(test)


def test_ids_outside_of_the_vocabulary_have_no_text() -> None:
    async def test() -> None:
        async with serving() as server:
            most = server.engine.facts.vocab_size
            assert (await server.post("/detokenize", {"tokens": [most - 1]})).status_code == 200
            reply = await server.post("/detokenize", {"tokens": [1, most]})
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, "tokens")

    run(test)


def test_a_rendered_chat_generates_as_the_chat_does() -> None:
    chat = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 5, "temperature": 0.5}

    async def test() -> None:
        async with serving() as server:
            rendered = (await server.post("/v1/chat/completions/render", chat)).json()
            ids = tiny_tokenizer().apply_chat_template(chat["messages"])
            assert rendered["token_ids"] == ids
            assert (await server.post("/tokenize", chat)).json()["tokens"] == ids
            reply = await server.post(PATH, rendered)
            assert reply.status_code == 200, reply.text
            await server.post("/v1/chat/completions", chat)
            first, second = server.link.requests
            assert first.prompt_ids.tolist() == second.prompt_ids.tolist() == ids
            assert first.sampling == second.sampling

    run(test)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/chat/completions/render"])
def test_a_model_without_text_says_so(path: str) -> None:
    async def test() -> None:
        async with serving(ids_only=True) as server:
            reply = await server.post(path, {"prompt": "a", "tokens": [1], "messages": []})
            assert reply.status_code == 400
            assert "tokenizer" in reply.json()["error"]["message"]

    run(test)


@pytest.mark.parametrize(
    "path,asked,kind",
    [
        ("/tokenize", {"prompt": "x" * 100_000}, "ContextTooLong"),
        ("/detokenize", {"tokens": [1] * 513}, "ContextTooLong"),
        ("/detokenize", {"tokens": [-1]}, "InvalidRequest"),
        ("/tokenize", {}, "InvalidRequest"),
    ],
)
def test_what_the_text_routes_refuse(path: str, asked: dict[str, Any], kind: str) -> None:
    async def test() -> None:
        async with serving() as server:
            error = (await server.post(path, asked)).json()["error"]
            assert (error["type"], error["code"]) == (kind, 400)

    run(test)
