"""Tokens as OpenAI's logprobs show them: bytes, names and places that fit the text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.protocol import RequestOutput, TopLogprobs
from rollout.http.openai.logprobs import TokenWriter, columns, prompt_logprobs
from rollout.ranks.ranked_executor import build_executor
from rollout.requests.outputs import LEAST_LOGPROB
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, run, serving
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer
from tests.helpers.token_families import FAMILIES, byte_level, sentencepiece

BUILT = {name: build() for name, build in FAMILIES.items()}
VOCAB = 280


def scored(ids: list[int], tops: list[list[tuple[int, float]]], start: int = 0) -> RequestOutput:
    """An output whose likeliest tokens are given, its own logprobs the first of them."""
    return RequestOutput(
        rid="a",
        start=start,
        token_ids=np.array(ids, np.int32),
        logprobs=np.array([dict(top).get(i, -8.0) for i, top in zip(ids, tops, strict=True)],
                          np.float32),
        top=TopLogprobs(
            np.array([[token for token, _ in top] for top in tops], np.int32),
            np.array([[value for _, value in top] for top in tops], np.float32),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_token_and_alternative_can_be_told_apart(name: str, data: st.DataObject) -> None:
    tokenizer = BUILT[name]
    token = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(token, min_size=1, max_size=8))
    tops = [
        [
            (i, -0.5 * rank)
            for rank, i in enumerate(data.draw(st.permutations(near(own, tokenizer))))
        ]
        for own in ids
    ]
    output = scored(ids, tops)
    as_ids, prompt = data.draw(st.booleans()), data.draw(st.sampled_from([[], [5, 6]]))
    options: dict[str, Any] = {"as_ids": as_ids, "skip_special_tokens": True, "prompt_ids": prompt}
    found = columns(TokenWriter(tokenizer, **options).completion(output, 4), 10_000)
    chat = TokenWriter(tokenizer, **options).chat(output, 4)["content"]
    for index, (own, top) in enumerate(zip(ids, tops, strict=True)):
        named = found["top_logprobs"][index]
        assert len(named) == len(top), "two tokens share a name"
        assert named[found["tokens"][index]] == found["token_logprobs"][index] == dict(top)[own]
        assert sorted(named.values()) == sorted(value for _, value in top)
        entry = chat[index]
        assert entry["logprob"] == found["token_logprobs"][index]
        assert entry["token"] == found["tokens"][index]
        for (other, value), shown in zip(top, entry["top_logprobs"], strict=True):
            assert shown["logprob"] == value
            if other != own:
                assert bytes(shown["bytes"]) == tokenizer.token_bytes(other)


def near(token: int, tokenizer: Any) -> list[int]:
    """A token and three more, one of them with the same bytes if there is one."""
    raw = tokenizer.token_bytes(token)
    same = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == raw]
    some = dict.fromkeys([token, *same, 0, 1, 2, 3])
    return list(some)[:4]


def test_a_banned_token_has_a_number_where_clients_read_one() -> None:
    output = scored([1], [[(1, -0.25), (2, -np.inf)]])
    writer = TokenWriter(None, as_ids=True, skip_special_tokens=True)
    assert columns(writer.completion(output, 2), 0)["top_logprobs"] == [
        {"token_id:1": -0.25, "token_id:2": LEAST_LOGPROB}
    ]
    (entry,) = writer.chat(output, 2)["content"]
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, LEAST_LOGPROB]
    prompt = RequestOutput(
        rid="a",
        start=0,
        token_ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        prompt_logprobs=np.array([-0.25], np.float32),
        prompt_top=output.top,
    )
    _, entries = prompt_logprobs(np.array([0, 1], np.int32), prompt, 2, None)
    assert entries is not None and entries["2"]["logprob"] == LEAST_LOGPROB


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder: Path = tmp_path_factory.mktemp("model")
    write_tiny(folder, vocab_size=VOCAB)
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=200, page_size=4),
        scheduler=SchedulerConfig(max_running=16, max_step_tokens=64),
    )


async def choices(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """Choices by index, those of a stream joined into `text` and lists."""
    reply = await server.post(path, body)
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return reply.json()["choices"]
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    parts = [c for line in lines[:-1] for c in json.loads(line)["choices"]]
    found = []
    for index in range(body["n"]):
        own = [part for part in parts if part["index"] == index]
        texts = [part.get("text", part.get("delta", {}).get("content")) for part in own]
        logprobs: dict[str, list[Any]] = {}
        for part in own:
            for name, column in (part.get("logprobs") or {}).items():
                logprobs.setdefault(name, []).extend(column or [])
        found.append({"text": "".join(texts), "logprobs": logprobs})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_served_tokens_are_the_bytes_of_the_text(
    make: Any, stream: bool, config: EngineConfig
) -> None:
    """A random model writes broken characters, special tokens and parts of words."""
    tokenizer = make()
    options = {"n": 3, "seed": 5, "stream": stream, "skip_special_tokens": False}
    options |= {"ignore_eos": True, "logit_bias": {"279": -100, "278": -100, "277": -100}}

    async def test() -> None:
        async with serving(engine=config, executor=build_executor, tokenizer=tokenizer) as server:
            body = {"prompt": "a is", "max_tokens": 40, "logprobs": 3, **options}
            for choice in await choices(server, "/v1/completions", body):
                text, logprobs = choice["text"], choice["logprobs"]
                raw = [as_bytes(token) for token in logprobs["tokens"]]
                assert b"".join(raw).decode(errors="replace") == text
                offsets = [*logprobs["text_offset"], len(text)]
                assert offsets == sorted(offsets)
                assert "".join(text[a:b] for a, b in itertools.pairwise(offsets)) == text
                assert all(len(top) in (3, 4) for top in logprobs["top_logprobs"])
            messages = [{"role": "user", "content": "a"}]
            body = {"messages": messages, "max_tokens": 40, "logprobs": True, **options}
            for choice in await choices(server, "/v1/chat/completions", body):
                text = choice["text"] if stream else choice["message"]["content"]
                entries = choice["logprobs"]["content"]
                joined = b"".join(bytes(entry["bytes"]) for entry in entries)
                assert joined.decode(errors="replace") == text
                assert [as_bytes(e["token"]) for e in entries] == [
                    bytes(e["bytes"]) for e in entries
                ]

    run(test)


def as_bytes(token: str) -> bytes:
    """The bytes that the name of a token says."""
    if token.startswith("bytes:\\x"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_has_the_offsets_of_the_whole(echo: bool, size: int) -> None:
    """Also where text is held back because it may begin a stop string, which then comes
    (size 12) or not."""

    async def test() -> None:
        async with serving() as server:
            text = tiny_tokenizer().decode(expected_tokens(ids_of("ab"), 20))
            body = {"prompt": "ab", "max_tokens": size, "logprobs": 1, "echo": echo, "n": 1}
            body |= {"stop": [text[1:7]], "return_token_ids": True}
            (whole,) = await choices(server, "/v1/completions", body)
            reply = await server.post("/v1/completions", {**body, "stream": True})
            lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
            parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
            for name, column in whole["logprobs"].items():
                assert [x for part in parts for x in part["logprobs"][name]] == column
            assert [x for part in parts for x in part["token_ids"]] == whole["token_ids"]
            assert max(whole["logprobs"]["text_offset"]) <= len(whole["text"])
            sent = 0
            for part in parts:
                sent += len(part["text"])
                assert max([0, *part["logprobs"]["text_offset"]]) <= sent

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_word_after_a_prompt_keeps_its_space(stream: bool, config: EngineConfig) -> None:
    tokenizer = sentencepiece()
    (word,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b" Paris"]
    body = {"prompt": "a", "max_tokens": 2, "logit_bias": {str(word): 100}, "logprobs": 0}

    async def test() -> None:
        async with serving(engine=config, executor=build_executor, tokenizer=tokenizer) as server:
            (choice,) = await choices(server, "/v1/completions", {**body, "n": 1, "stream": stream})
            assert choice["text"] == " Paris Paris"
            assert choice["logprobs"]["tokens"] == [" Paris", " Paris"]
            assert choice["logprobs"]["text_offset"] == [0, 6]
            sampling = {"max_new_tokens": 2, "logit_bias": {str(word): 100}}
            native = {"text": "a", "sampling_params": sampling, "return_logprob": True}
            reply = await server.post("/generate", {**native, "return_text_in_logprobs": True})
            assert reply.json()["text"] == " Paris Paris"
            entries = reply.json()["meta_info"]["output_token_logprobs"]
            assert [entry[2] for entry in entries] == [" Paris", " Paris"]

    run(test)


def test_tokens_that_a_minimum_bans_have_numbers_in_replies(config: EngineConfig) -> None:
    """All tokens are asked for, so the banned ones, at -inf, are among them."""

    async def test() -> None:
        async with serving(
            engine=config, executor=build_executor, tokenizer=byte_level()
        ) as server:
            limits = {"max_tokens": 3, "min_tokens": 3, "stop_token_ids": [5, 6]}
            body = {**limits, "prompt": [7, 8], "logprobs": -1, "return_tokens_as_token_ids": True}
            (choice,) = await choices(server, "/v1/completions", body)
            for top in choice["logprobs"]["top_logprobs"]:
                assert len(top) == VOCAB
                assert top["token_id:5"] == top["token_id:6"] == LEAST_LOGPROB
                assert min(top.values()) == LEAST_LOGPROB
            sampling = {"max_new_tokens": 3, "min_new_tokens": 3, "stop_token_ids": [5, 6]}
            native = {"input_ids": [7, 8], "sampling_params": sampling, "return_logprob": True}
            reply = await server.post("/generate", {**native, "top_logprobs_num": VOCAB})
            for row in reply.json()["meta_info"]["output_top_logprobs"]:
                assert {token: v for v, token, _ in row}[5] == LEAST_LOGPROB
                assert all(isinstance(value, float) for value, _, _ in row)

    run(test)
