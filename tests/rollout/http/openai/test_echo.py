"""`echo`: a completion that begins with its prompt, and logprobs of both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, run, serving
from tests.helpers.tiny_tokenizer import BOS_ID, ids_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


async def complete(server: Server, **body: Any) -> list[Any]:
    """Choices by index; those of a stream with their frames joined."""
    reply = await server.post("/v1/completions", {"echo": True, "max_tokens": 3, **body})
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return reply.json()["choices"]
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    joined: dict[int, Any] = {}
    for frame in map(json.loads, lines[:-1]):
        for choice in frame["choices"]:
            index = choice["index"]
            if index not in joined:
                joined[index] = choice
                continue
            whole = joined[index]
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for name, column in (choice["logprobs"] or {}).items():
                whole["logprobs"][name] += column
    return [joined[index] for index in range(len(joined))]


def check(choice: Any, prompt: list[int], size: int, *, count: int = 1) -> None:
    """The choice of the fake engine, whose token t has the logprob -t / 100."""
    ids = prompt + expected_tokens(prompt, size)
    logprobs = choice["logprobs"]
    assert choice["text"] == TOKENIZER.decode(ids)
    shown = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert "".join(logprobs["tokens"]) == shown
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx([-t / 100 for t in ids[1:]])
    columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in list(zip(*columns, strict=True))[1:]:
        assert top[token] == logprob == max(top.values())
        assert len(top) == max(count, 1)
    offsets = [*logprobs["text_offset"], len(choice["text"])]
    for token, start, end in zip(logprobs["tokens"], offsets, offsets[1:], strict=False):
        assert choice["text"][start:end] in (token, "")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "prompts", ["abc", ["abc", "d", "ab"], [[5, 6, 7]], [[5, 6], [7, 8, 9]]], ids=str
)
def test_a_choice_begins_with_its_prompt(prompts: Any, size: int, n: int, stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            found = await complete(
                server, prompt=prompts, n=n, stream=stream, logprobs=1, max_tokens=size
            )
            several = [prompts] if isinstance(prompts, str) else prompts
            wanted = [ids_of(p) if isinstance(p, str) else p for p in several for _ in range(n)]
            assert len(found) == len(wanted)
            for choice, ids in zip(found, wanted, strict=True):
                check(choice, ids, size)
                assert choice["finish_reason"] == "length"

    run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("prompt", ["abc", "a"])
def test_nothing_but_the_prompt(prompt: str, logprobs: int | None, stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            (choice,) = await complete(
                server, prompt=prompt, max_tokens=0, logprobs=logprobs, stream=stream
            )
            assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
            if logprobs is None:
                assert choice["logprobs"] is None
            else:
                check(choice, ids_of(prompt), 0, count=logprobs)

    run(test)


def test_without_logprobs_no_prompt_is_scored() -> None:
    async def test() -> None:
        async with serving() as server:
            (choice,) = await complete(server, prompt="abc")
            assert choice["text"] == TOKENIZER.decode(
                ids_of("abc") + expected_tokens([64, 65, 66], 3)
            )
            assert choice["logprobs"] is None
            assert server.link.requests[-1].prompt_logprob_start == -1

    run(test)


def test_a_bos_of_the_tokenizer_has_an_entry_and_no_text() -> None:
    async def test() -> None:
        async with serving(tokenizer=tiny_tokenizer(add_bos=True)) as server:
            (choice,) = await complete(server, prompt="ab", logprobs=0)
            check(choice, [BOS_ID, *ids_of("ab")], 3)
            assert choice["logprobs"]["tokens"][0] == "<|bos|>"
            assert choice["logprobs"]["text_offset"][:3] == [0, 0, 1]

    run(test)


def test_a_model_without_text_echoes_ids() -> None:
    async def test() -> None:
        async with serving(ids_only=True) as server:
            (choice,) = await complete(server, prompt=[5, 6], logprobs=1, max_tokens=1)
            names = [f"token_id:{token}" for token in [5, 6, *expected_tokens([5, 6], 1)]]
            assert choice["logprobs"]["tokens"] == names
            assert choice["logprobs"]["text_offset"] == [0, 0, 0]
            assert (choice["text"], choice["logprobs"]["token_logprobs"][0]) == ("", None)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_in_the_prompt_ends_nothing(stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            text = TOKENIZER.decode(expected_tokens(ids_of("abc"), 3))
            (choice,) = await complete(
                server, prompt="abc", stop=["b", text[1:3]], logprobs=0, stream=stream
            )
            assert (choice["text"], choice["finish_reason"]) == ("abc" + text[:1], "stop")
            offsets = choice["logprobs"]["text_offset"]
            assert len(offsets) == 6 and max(offsets) <= len(choice["text"])

    run(test)
