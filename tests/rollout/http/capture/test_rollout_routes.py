"""Rollouts over HTTP: OpenAI calls below a base URL, recorded token by token."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.config import SessionConfig
from rollout.text.special_tokens import SpecialTokens
from rollout.text.tokenizer import Tokenizer
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, events, run, serving, until
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import IM_END_ID, TEMPLATE, tiny_tokenizer

USER = {"role": "user", "content": "ab"}
MORE = {"role": "user", "content": "c"}


async def opened(server: Server, **fields: Any) -> str:
    reply = await server.post("/rollouts", fields)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["base_url"])


async def chat(server: Server, base: str, messages: list[Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 4, **fields}
    reply = await server.post(f"{base}/chat/completions", body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def record(server: Server, base: str) -> dict[str, Any]:
    return dict((await server.get(base.removesuffix("/v1"))).json())


def flat(branch: dict[str, Any]) -> list[int]:
    return [token for segment in branch["segments"] for token in segment["token_ids"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_is_one_branch_of_the_tokens_that_were_sampled(stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            base = await opened(server)
            messages: list[Any] = [USER]
            for _ in range(3):
                body = {"messages": messages, "max_tokens": 4, "stream": stream}
                reply = await server.post(f"{base}/chat/completions", body)
                if stream:
                    frames = [frame for frame in events(reply.text) if frame]
                    text = "".join(f["choices"][0]["delta"]["content"] for f in frames)
                else:
                    text = reply.json()["choices"][0]["message"]["content"]
                messages = [*messages, {"role": "assistant", "content": text}, MORE]
            found = await record(server, base)
            assert found["complete"] and found["num_calls"] == 3
            assert [call["failed"] for call in found["calls"]] == [""] * 3
            (branch,) = found["branches"]
            sampled = [s for s in branch["segments"] if s["sampled"]]
            assert [s["call"] for s in sampled] == [0, 1, 2] and all(s["new"] for s in sampled)
            ids = flat(branch)
            assert ids == server.link.requests[-1].prompt_ids.tolist() + sampled[-1]["token_ids"]
            start = 0
            for segment in branch["segments"]:
                end = start + len(segment["token_ids"])
                if segment["sampled"]:
                    assert segment["token_ids"] == expected_tokens(ids[:start], 4)
                    assert len(segment["logprobs"]) == 4 and max(segment["logprobs"]) < 0
                    assert segment["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]
                start = end

    run(test)


def merging_tokenizer(first: str) -> Tokenizer:
    """The tiny tokenizer with a token for the two characters of `first`, which encoding takes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    names = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|eos|>"]
    vocab |= dict(zip(names, (256, 257, 258, 299), strict=True))
    vocab |= {f"<|reserved_{i}|>": i for i in range(260, 299)} | {first: 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(first[0], first[1])]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return Tokenizer(backend, SpecialTokens(bos="<|bos|>", eos="<|eos|>", eos_ids=[299]), TEMPLATE)


def test_what_was_sampled_is_never_encoded_again() -> None:
    """The reply is two tokens that encoding its text would make one of."""
    plain = tiny_tokenizer()
    prompt = plain.apply_chat_template([USER])
    reply = expected_tokens(prompt, 4)
    tokenizer = merging_tokenizer(plain.decode(reply[:2]))
    text = tokenizer.decode(reply)
    assert tokenizer.encode(text) != reply

    async def test() -> None:
        async with serving(tokenizer=tokenizer) as server:
            base = await opened(server)
            said = (await chat(server, base, [USER]))["choices"][0]["message"]
            assert said["content"] == text
            await chat(server, base, [USER, said, MORE])
            found = await record(server, base)
            (branch,) = found["branches"]
            assert flat(branch)[: len(prompt) + 4] == prompt + reply
            # Outside of a rollout there is nothing to go on from.
            await server.post("/v1/chat/completions", {"messages": [USER, said, MORE]})
            again = server.link.requests[-1].prompt_ids.tolist()
            assert again[len(prompt) : len(prompt) + 4] != reply

    run(test)


def test_prompts_that_differ_fork_and_shared_replies_count_once() -> None:
    async def test() -> None:
        async with serving() as server:
            base = await opened(server)
            said = (await chat(server, base, [USER]))["choices"][0]["message"]
            await chat(server, base, [USER, said, MORE])
            await chat(server, base, [USER, said, {"role": "user", "content": "else"}])
            await chat(server, base, [USER, {"role": "assistant", "content": "other"}, MORE])
            await chat(server, base, [MORE], n=2)
            found = await record(server, base)
            assert found["complete"] and found["num_calls"] == 5
            new = [
                [s["call"] for s in branch["segments"] if s["sampled"] and s["new"]]
                for branch in found["branches"]
            ]
            assert sorted(new) == [[0, 1], [2], [3], [4], [4]]

    run(test)


def test_ids_that_a_client_sends_are_taken_as_they_are() -> None:
    async def test() -> None:
        async with serving() as server:
            base = await opened(server)
            url = f"{base}/completions"
            first = (await server.post(url, {"prompt": [5, 6], "max_tokens": 3})).json()
            assert first["choices"][0]["logprobs"] is None, "nobody asked for them"
            ids = [5, 6, *expected_tokens([5, 6], 3), 7]
            await server.post(url, {"prompt": ids, "max_tokens": 3})
            await server.post(url, {"prompt": tiny_tokenizer().decode(ids) + "x", "max_tokens": 2})
            await server.post(url, {"prompt": [[8], [9]], "max_tokens": 2})
            found = await record(server, base)
            # The text says more than the first branch, whose last reply it does not repeat.
            text = tiny_tokenizer().encode(tiny_tokenizer().decode(ids) + "x")
            assert sorted(map(flat, found["branches"])) == sorted(
                prompt + expected_tokens(prompt, count)
                for prompt, count in ((ids, 3), (text, 2), ([8], 2), ([9], 2))
            )

    run(test)


def dropping() -> Tokenizer:
    """With a template that leaves out of old replies all up to a mark, as templates do with what
    was thought; the reply to USER has that mark in its middle."""
    plain = tiny_tokenizer()
    mark = plain.decode(expected_tokens(plain.apply_chat_template([USER]), 4))[1]
    assert mark not in "Zq7Xk'"
    content = "{{ m.content.split('" + mark + "')[-1] }}"
    return tiny_tokenizer(
        template="{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}" + content + "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize("history", ["kept", "template"])
def test_history_is_kept_where_a_template_drops_it(history: str) -> None:
    async def test() -> None:
        async with serving(tokenizer=dropping()) as server:
            reply = (await server.post("/rollouts", {"history": history})).json()
            assert reply["template"]["append_only"], "of a reply without the mark"
            base = reply["base_url"]
            said = (await chat(server, base, [USER]))["choices"][0]["message"]
            await chat(server, base, [USER, said, MORE])
            found = await record(server, base)
            assert len(found["branches"]) == (1 if history == "kept" else 2)
            if history == "kept":
                prompt = server.link.requests[-1].prompt_ids.tolist()
                first = server.link.requests[0].prompt_ids.tolist()
                reply_ids = expected_tokens(first, 4)
                assert prompt[: len(first) + 4] == first + reply_ids
                # It was cut by its length, so the template's end of the turn is in the bridge.
                assert prompt[len(first) + 4] == IM_END_ID

    run(test)


def test_a_stop_token_that_was_sampled_is_not_written_twice() -> None:
    async def test() -> None:
        async with serving(tokenizer=dropping()) as server:
            base = await opened(server)
            end = {"allowed_token_ids": [IM_END_ID], "stop_token_ids": [IM_END_ID]}
            said = (await chat(server, base, [USER], **end))["choices"][0]["message"]
            await chat(server, base, [USER, said, MORE])
            prompt = server.link.requests[-1].prompt_ids.tolist()
            first = server.link.requests[0].prompt_ids.tolist()
            assert prompt[: len(first) + 1] == [*first, IM_END_ID]
            assert prompt[len(first) + 1] != IM_END_ID
            assert len((await record(server, base))["branches"]) == 1

    run(test)


def test_calls_of_tools_are_found_by_what_was_said() -> None:
    """A client sends back what it got, with fields of its own."""

    async def test() -> None:
        async with serving(tokenizer=dropping()) as server:
            base = await opened(server)
            said = (await chat(server, base, [USER]))["choices"][0]["message"]
            more = {**said, "refusal": None, "reasoning_content": "?", "tool_calls": None}
            parts = {"role": "user", "content": [{"type": "text", "text": "ab"}]}
            await chat(server, base, [parts, more, MORE])
            assert len((await record(server, base))["branches"]) == 1
            changed = {**said, "content": said["content"] + "!"}
            await chat(server, base, [USER, changed, MORE])
            assert len((await record(server, base))["branches"]) == 2

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_recorded_too(stream: bool) -> None:
    async def test() -> None:
        async with serving(tokenizer=dropping()) as server:
            base = await opened(server)
            ask = {"max_output_tokens": 4, "stream": stream}
            first = await server.post(f"{base}/responses", {"input": "ab", **ask})
            found = first.json() if not stream else None
            if stream:
                lines = [x for x in first.text.split("\n") if x.startswith("data: ")]
                found = json.loads(lines[-1].removeprefix("data: "))["response"]
            more = {"input": "c", "previous_response_id": found["id"], **ask}
            assert (await server.post(f"{base}/responses", more)).status_code == 200
            told = await record(server, base)
            assert told["complete"] and told["calls"][0]["id"] == found["id"]
            (branch,) = told["branches"]
            assert [s["call"] for s in branch["segments"] if s["sampled"]] == [0, 1]

    run(test)


def test_messages_are_recorded_too() -> None:
    async def test() -> None:
        async with serving(tokenizer=dropping()) as server:
            base = await opened(server)
            ask: dict[str, Any] = {"model": "default", "max_tokens": 4}
            first = (await server.post(f"{base}/messages", {"messages": [USER], **ask})).json()
            said = {"role": "assistant", "content": first["content"]}
            body = {"messages": [USER, said, MORE], **ask}
            assert (await server.post(f"{base}/messages", body)).status_code == 200
            told = await record(server, base)
            assert told["complete"] and len(told["branches"]) == 1

    run(test)


def test_a_client_that_leaves_marks_its_call_failed() -> None:
    async def test() -> None:
        async with serving() as server:
            base = await opened(server)
            server.link.stalled = True
            body = {"messages": [USER], "max_tokens": 4}
            asked = asyncio.create_task(server.post(f"{base}/chat/completions", body))
            await until(lambda: bool(server.link.requests))
            found = await record(server, base)
            assert not found["complete"] and found["calls"][0]["open"]
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            server.link.stalled = False
            found = await record(server, base)
            assert found["calls"][0]["failed"] and not found["complete"]
            assert found["branches"] == []

    run(test)


def test_a_body_that_is_refused_leaves_the_rollout_complete() -> None:
    async def test() -> None:
        async with serving() as server:
            base = await opened(server)
            for body in ({"messages": []}, {"messages": [USER], "top_k": -7}, {"oops": 1}):
                reply = await server.post(f"{base}/chat/completions", body)
                assert reply.status_code == 400, reply.text
            await chat(server, base, [USER])
            found = await record(server, base)
            assert found["complete"] and len(found["branches"]) == 1
            assert all(call["refused"] for call in found["calls"][:-1])

    run(test)


def test_rewards_are_of_a_rollout_or_of_a_call() -> None:
    async def test() -> None:
        async with serving() as server:
            base = await opened(server, rollout_id="mine")
            assert base == "/rollouts/mine/v1"
            reply = await chat(server, base, [USER])
            assert (await server.post("/rollouts/mine/reward", {"reward": 0.5})).status_code == 200
            await server.post("/rollouts/mine/reward", {"reward": 2, "call": 0})
            found = await record(server, base)
            assert (found["reward"], found["calls"][0]["reward"]) == (0.5, 2.0)
            assert found["calls"][0]["id"] == reply["id"]
            wrong = await server.post("/rollouts/mine/reward", {"reward": 2, "call": 1})
            assert (wrong.status_code, wrong.json()["error"]["field"]) == (400, "call")
            for body in ({}, {"reward": "1"}, {"reward": 1, "other": 2}):
                assert (await server.post("/rollouts/mine/reward", body)).status_code == 400
            assert (await server.http.delete("/rollouts/mine")).status_code == 200
            for method, path in (
                ("GET", "/rollouts/mine"),
                ("DELETE", "/rollouts/mine"),
                ("POST", "/rollouts/mine/reward"),
                ("POST", "/rollouts/mine/v1/chat/completions"),
            ):
                body = {"reward": 1} if path.endswith("reward") else {"messages": [USER]}
                gone = await server.http.request(method, path, json=body)
                error = gone.json()["error"]
                assert (gone.status_code, error["type"]) == (404, "UnknownRollout"), error
                assert error["field"] == "rollout" and "deleted" in error["message"]

    run(test)


def test_a_full_store_refuses_by_name() -> None:
    async def test() -> None:
        sessions = SessionConfig(max_rollouts=1, rollout_bytes=5000)
        engine = dataclasses.replace(fake_config(), sessions=sessions)
        async with serving(engine=engine) as server:
            base = await opened(server)
            full = await server.post("/rollouts", {})
            assert (full.status_code, full.json()["error"]["type"]) == (429, "StoreFull")
            body = {"prompt": [5] * 400, "max_tokens": 60}
            for _ in range(3):
                reply = await server.post(f"{base}/completions", body)
                if reply.status_code != 200:
                    break
            assert reply.status_code == 429, "what is not recorded is not answered"
            assert not (await record(server, base))["complete"]

    run(test)


def test_models_and_unknown_routes_below_the_base_url() -> None:
    async def test() -> None:
        async with serving(served_model_name="m") as server:
            base = await opened(server)
            assert (await server.get(f"{base}/models")).json()["data"][0]["id"] == "m"
            assert (await server.post(f"{base}/nothing", {})).status_code == 404

    run(test)
