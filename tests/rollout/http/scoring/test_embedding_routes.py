"""/v1/embeddings and /encode over the fake engine."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_executor import HIDDEN_SIZE, NOT_FINITE, expected_embedding
from tests.helpers.http_app import run, serving, until
from tests.helpers.tiny_tokenizer import BOS_ID, EOS_ID, ids_of, tiny_tokenizer

PATH = "/v1/embeddings"


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def close(found: list[float], wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "given, prompts",
    [
        ("ab", ["ab"]),
        (["ab", "cde"], ["ab", "cde"]),
        (ids_of("ab"), ["ab"]),
        ([ids_of("ab"), ids_of("cde")], ["ab", "cde"]),
    ],
)
def test_texts_and_ids_are_embedded_in_their_order(given: Any, prompts: list[str]) -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            reply = await server.post(PATH, {"input": given, "model": "mine"})
            assert reply.status_code == 200, reply.text
            found = reply.json()
            assert found["object"] == "list" and found["model"] == "mine"
            assert [entry["index"] for entry in found["data"]] == list(range(len(prompts)))
            for entry, prompt in zip(found["data"], prompts, strict=True):
                assert entry["object"] == "embedding" and entry["weight_version"] == "0"
                close(entry["embedding"], unit(expected_embedding(ids_of(prompt))))
            size = sum(map(len, prompts))
            assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == size
            assert all(request.task == "embed" for request in server.link.requests)

    run(test)


def test_length_dimensions_pooling_and_encoding() -> None:
    vector, mean = (expected_embedding(ids_of("abc"), how) for how in ("last", "mean"))
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"normalize": False}, vector),
        ({"use_activation": False}, vector),
        ({"dimensions": 3}, unit(vector[:3])),
        ({"dimensions": 3, "normalize": False}, vector[:3]),
        ({"pooling": "mean"}, unit(mean)),
    ]

    async def test() -> None:
        async with serving() as server:
            for options, wanted in cases:
                reply = (await server.post(PATH, {"input": "abc", **options})).json()
                close(reply["data"][0]["embedding"], wanted)
                asked = {"input": "abc", "encoding_format": "base64", **options}
                text = (await server.post(PATH, asked)).json()["data"][0]["embedding"]
                decoded = np.frombuffer(base64.b64decode(text), "<f4")
                assert decoded.tolist() == pytest.approx(reply["data"][0]["embedding"])

    run(test)


CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


def test_a_conversation_is_embedded_as_the_template_writes_it() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    written = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    asking = tokenizer.apply_chat_template(CHAT)

    async def test() -> None:
        async with serving(tokenizer=tokenizer) as server:
            for options, wanted in (
                ({}, written),
                ({"add_special_tokens": True}, [BOS_ID, *written]),
                ({"add_generation_prompt": True}, asking),
                ({"truncate_prompt_tokens": 6, "truncation_side": "left"}, written[-6:]),
                ({"input": None, "chat_template_kwargs": {"tone": None}}, written),
            ):
                reply = await server.post(PATH, {"messages": CHAT, "model": "fake", **options})
                assert reply.status_code == 200, reply.text
                assert server.link.requests[-1].prompt_ids.tolist() == wanted
                (entry,) = reply.json()["data"]
                close(entry["embedding"], unit(expected_embedding(wanted)))
                assert reply.json()["usage"]["prompt_tokens"] == len(wanted)

    run(test)


@pytest.mark.parametrize(
    "body, field",
    [
        ({"messages": []}, "messages"),
        ({"messages": "ab"}, "messages"),
        ({"messages": CHAT, "input": "a"}, "messages"),
        ({"messages": [{"role": "user", "content": "b" * 600}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": CHAT, "chat_template": "{{ 1 }}"}, "chat_template"),
        (
            {"messages": CHAT, "chat_template_kwargs": {"messages": 1}},
            "chat_template_kwargs.messages",
        ),
        ({"messages": CHAT, "continue_final_message": True}, "continue_final_message"),
        ({"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_a_conversation_that_does_not_fit_is_refused_by_name(
    body: dict[str, Any], field: str
) -> None:
    async def test() -> None:
        async with serving(
            tokenizer=tiny_tokenizer(template="{{ messages[0].content }}")
        ) as server:
            reply = await server.post(PATH, body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"].startswith(field), reply.text

    run(test)


def test_a_long_prompt_is_cut_where_that_is_asked_for() -> None:
    long = "abcdefgh" * 100
    ids = ids_of(long)

    async def test() -> None:
        async with serving(tokenizer=tiny_tokenizer(add_bos=True)) as server:
            for options, wanted in (
                ({"truncate_prompt_tokens": 5}, [BOS_ID, *ids[:4]]),
                ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, [BOS_ID, *ids[-4:]]),
                ({"truncate_prompt_tokens": -1}, [BOS_ID, *ids[:511]]),
                ({"truncate_prompt_tokens": 3, "add_special_tokens": False}, ids[:3]),
            ):
                reply = await server.post(PATH, {"input": long, **options})
                assert reply.status_code == 200, reply.text
                assert server.link.requests[-1].prompt_ids.tolist() == wanted
            reply = await server.post(PATH, {"input": [[1, 2, 3]], "truncate_prompt_tokens": 2})
            assert server.link.requests[-1].prompt_ids.tolist() == [1, 2]

    run(test)


def test_a_prompt_may_fill_the_whole_context() -> None:
    async def test() -> None:
        async with serving() as server:
            for path, name in ((PATH, "input"), ("/encode", "input_ids")):
                assert (await server.post(path, {name: [5] * 512})).status_code == 200
                reply = await server.post(path, {name: [5] * 513})
                assert (reply.status_code, reply.json()["error"]["type"]) == (400, "ContextTooLong")
                assert reply.json()["error"]["param"] == name

    run(test)


@pytest.mark.parametrize(
    "body, field",
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["ab", ""]}, "input[1]"),
        ({"input": [[5], [1 << 20]]}, "input[1]"),
        ({"input": [5] * 600}, "input"),
        ({"input": ["a", "b" * 600]}, "input[1]"),
        ({"input": {"a": 1}}, "input"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "temperature": 1}, "temperature"),
        ({"input": "a", "request_id": "x" * 300}, "request_id"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(PATH, body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == field

    run(test)


def test_another_model_and_numbers_that_are_none() -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(PATH, {"input": "a", "model": "another"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
            reply = await server.post(PATH, {"input": [NOT_FINITE, 5]})
            assert reply.json()["error"]["type"] == "NonFiniteLogits"
            assert (await server.post(PATH, {"input": "a"})).status_code == 200

    run(test)


def test_a_client_that_aborts_is_told_so() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            waits = asyncio.create_task(server.post(PATH, {"input": "a", "request_id": "mine"}))
            await until(lambda: server.engine.num_open > 0)
            await server.post("/abort_request", {"rid": "mine"})
            reply = await waits
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "NoResult")

    run(test)


def test_encode_answers_as_sglang_does() -> None:
    async def test() -> None:
        async with serving() as server:
            one = (await server.post("/encode", {"text": "ab", "rid": "r", "model": "any"})).json()
            close(one["embedding"], unit(expected_embedding(ids_of("ab"))))
            assert one["meta_info"]["id"] == "r" and one["meta_info"]["prompt_tokens"] == 2
            assert one["meta_info"]["weight_version"] == "0"
            body = {"input_ids": [[1, 2], [3]], "pooling": "mean", "normalize": False}
            many = (await server.post("/encode", {**body, "dimensions": 4})).json()
            for reply, ids in zip(many, [[1, 2], [3]], strict=True):
                close(reply["embedding"], expected_embedding(ids, "mean")[:4])
            for name, value in (("stream", True), ("dimensions", 99), ("pooling", 1), ("txt", 1)):
                reply = await server.post("/encode", {"text": "a", name: value})
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)

    run(test)


def test_a_model_without_text_embeds_ids() -> None:
    async def test() -> None:
        async with serving(ids_only=True) as server:
            assert (await server.post(PATH, {"input": [EOS_ID, 5]})).status_code == 200
            for name, value in (("input", "a"), ("messages", CHAT)):
                reply = await server.post(PATH, {name: value})
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)

    run(test)
