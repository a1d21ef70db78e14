"""/v1/completions and /v1/chat/completions: what TRL reads, streams, and refusals."""

import json
from typing import Any

import pytest

from engine.errors import ContextTooLong
from rollout.http.openai.bodies import renamed
from rollout.http.openai.logprobs import prompt_logprobs
from tests.helpers.fake_executor import VOCAB_SIZE, expected_tokens
from tests.helpers.http_app import Server, run, serving
from tests.helpers.tiny_tokenizer import IM_END_ID, ids_of, tiny_tokenizer

CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3}


def frames(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def complete(server: Server, **body: Any) -> Any:
    reply = await server.post("/v1/completions", {"model": "fake", "max_tokens": 4, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_choices_are_prompt_major_with_ids_and_logprobs() -> None:
    async def test() -> None:
        async with serving() as server:
            found = await complete(
                server,
                prompt=["ab", "c"],
                n=2,
                logprobs=2,
                return_token_ids=True,
                return_tokens_as_token_ids=True,
            )
            assert found["object"] == "text_completion"
            prompts = [ids_of("ab")] * 2 + [ids_of("c")] * 2
            for index, (choice, prompt) in enumerate(zip(found["choices"], prompts, strict=True)):
                ids = expected_tokens(prompt, 4)
                assert choice["index"] == index
                assert choice["prompt_token_ids"] == prompt
                assert choice["token_ids"] == ids
                assert choice["text"] == tiny_tokenizer().decode(ids)
                assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
                logprobs = choice["logprobs"]
                assert logprobs["tokens"] == [f"token_id:{token}" for token in ids]
                assert logprobs["token_logprobs"] == pytest.approx([-t / 100 for t in ids])
                top = logprobs["top_logprobs"][0]
                assert set(top) == {f"token_id:{ids[0] + extra}" for extra in (0, 1)}
            assert found["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": 16,
                "total_tokens": 19,
                "prompt_tokens_details": found["usage"]["prompt_tokens_details"],
            }

    run(test)


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
def test_prompts_of_ids(prompt: Any) -> None:
    async def test() -> None:
        async with serving(ids_only=True) as server:
            found = await complete(server, prompt=prompt, return_token_ids=True, logprobs=0)
            (choice,) = found["choices"]
            assert choice["token_ids"] == expected_tokens([5, 6], 4)
            assert choice["logprobs"]["tokens"][0].startswith("token_id:")
            for token, top in zip(
                choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True
            ):
                assert top == {f"token_id:{token}": pytest.approx(-token / 100)}

    run(test)


def test_options_reach_the_engine_under_their_native_names() -> None:
    async def test() -> None:
        async with serving() as server:
            await complete(
                server, prompt="a", temperature=0.5, top_k=0, top_p=None, min_p=0.1, seed=3,
                repetition_penalty=1.1, stop_token_ids=[9], ignore_eos=True, min_tokens=2,
                logit_bias={"7": -1}, cache_salt="s", kv_policy="recompute",
            )  # fmt: skip
            (request,) = server.link.requests
            sampling = request.sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, -1, 1.0)
            assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
            assert (sampling.min_new_tokens, sampling.max_new_tokens) == (2, 4)
            assert sampling.logit_bias == {7: -1.0}
            assert (request.stop_ids, request.salt) == ([9], "s")
            assert request.kv_policy == "recompute"

    run(test)


def test_scoring_a_prompt() -> None:
    async def test() -> None:
        async with serving() as server:
            found = await complete(server, prompt=[[5, 6, 7]], prompt_logprobs=2, max_tokens=1)
            (choice,) = found["choices"]
            first, *rest = choice["prompt_logprobs"]
            assert first is None
            for token, entries in zip([6, 7], rest, strict=True):
                assert list(entries) == [str(token), str(token + 1)]
                own = entries[str(token)]
                assert own["logprob"] == pytest.approx(-token / 100)
                assert own["rank"] == 1
                assert own["decoded_token"] == chr(33 + token)
            assert choice["logprobs"] is None

    run(test)


def test_a_token_outside_the_likeliest_has_the_next_rank() -> None:
    import numpy as np

    from engine.protocol import RequestOutput, TopLogprobs

    top = TopLogprobs(np.array([[3, 4]], np.int32), np.array([[-0.1, -0.2]], np.float32))
    output = RequestOutput(
        rid="r",
        start=0,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        prompt_logprobs=np.array([-9.0], np.float32),
        prompt_top=top,
    )
    _, entries = prompt_logprobs(np.array([1, 2], np.int32), output, 2, None)
    assert entries is not None
    assert {key: entry["rank"] for key, entry in entries.items()} == {"3": 1, "4": 2, "2": 3}
    assert entries["2"]["logprob"] == -9.0


def test_a_completion_as_a_stream() -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(
                "/v1/completions",
                {
                    "prompt": ["ab", "c"],
                    "max_tokens": 4,
                    "stream": True,
                    "logprobs": 1,
                    "return_token_ids": True,
                    "stream_options": {"include_usage": True},
                },
            )
            *parts, last = frames(reply.text)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 8
            for index, prompt in enumerate(("ab", "c")):
                own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == index]
                ids = expected_tokens(ids_of(prompt), 4)
                assert [part["token_ids"] for part in own] == [[token] for token in ids]
                assert "".join(part["text"] for part in own) == tiny_tokenizer().decode(ids)
                assert [part["finish_reason"] for part in own] == [None, None, None, "length"]
                assert own[0]["prompt_token_ids"] == ids_of(prompt)
                assert own[1]["prompt_token_ids"] is None
                offsets = [part["logprobs"]["text_offset"] for part in own]
                assert offsets == [[0], [1], [2], [3]]
                assert own[-1]["weight_version"] == "0"

    run(test)


def test_a_stop_string_and_a_stop_token() -> None:
    async def test() -> None:
        async with serving() as server:
            ids = expected_tokens(ids_of("ab"), 20)
            text = tiny_tokenizer().decode(ids)
            found = await complete(server, prompt="ab", stop=text[3:5], max_tokens=20)
            (choice,) = found["choices"]
            assert (choice["text"], choice["stop_reason"]) == (text[:3], text[3:5])
            assert choice["finish_reason"] == "stop"
            found = await complete(server, prompt="ab", stop_token_ids=[ids[2]], max_tokens=20)
            assert found["choices"][0]["stop_reason"] == ids[2]

    run(test)


def test_chat_renders_the_template_and_returns_ids() -> None:
    async def test() -> None:
        async with serving() as server:
            options = {"n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
            reply = await server.post("/v1/chat/completions", {**CHAT, **options})
            found = reply.json()
            prompt = tiny_tokenizer().apply_chat_template(CHAT["messages"])  # type: ignore[arg-type]
            assert prompt[-1] != IM_END_ID
            ids = expected_tokens(prompt, 3)
            assert found["object"] == "chat.completion"
            assert found["prompt_token_ids"] == prompt
            for choice in found["choices"]:
                assert choice["token_ids"] == ids
                content = tiny_tokenizer().decode(ids)
                assert choice["message"] == {"role": "assistant", "content": content}
                entries = choice["logprobs"]["content"]
                assert [entry["logprob"] for entry in entries] == pytest.approx(
                    [-token / 100 for token in ids]
                )
                assert len(entries[0]["top_logprobs"]) == 1
            assert found["usage"]["completion_tokens"] == 6
            assert found["usage"]["prompt_tokens"] == len(prompt)

    run(test)


def test_a_template_of_the_caller_with_variables_and_parts() -> None:
    async def test() -> None:
        async with serving(trust_request_chat_template=True) as server:
            body = {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
                "chat_template": "{{ messages[0]['content'] }}{{ mark }}",
                "chat_template_kwargs": {"mark": "yz"},
                "max_tokens": 2,
                "return_token_ids": True,
                "tool_choice": "none",
            }
            found = (await server.post("/v1/chat/completions", body)).json()
            assert found["prompt_token_ids"] == ids_of("xyz")

    run(test)


def test_chat_as_a_stream() -> None:
    async def test() -> None:
        async with serving() as server:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            reply = await server.post("/v1/chat/completions", {**CHAT, **options})
            first, *parts, last = frames(reply.text)
            assert first["object"] == "chat.completion.chunk"
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            prompt = tiny_tokenizer().apply_chat_template(CHAT["messages"])  # type: ignore[arg-type]
            text = "".join(part["choices"][0]["delta"]["content"] for part in parts)
            assert text == tiny_tokenizer().decode(expected_tokens(prompt, 3))
            assert parts[-1]["choices"][0]["finish_reason"] == "length"
            assert last["usage"]["completion_tokens"] == 3

    run(test)


def test_chat_without_a_limit_takes_the_rest_of_the_context() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"messages": CHAT["messages"]}
            found = (await server.post("/v1/chat/completions", body)).json()
            usage = found["usage"]
            assert usage["total_tokens"] == 512

    run(test)


@pytest.mark.parametrize(
    "path,body,kind,field",
    [
        ("completions", {}, "InvalidRequest", "prompt"),
        ("chat/completions", {"max_tokens": 3}, "InvalidRequest", "messages"),
        ("completions", {"prompt": []}, "InvalidRequest", "prompt"),
        ("completions", {"prompt": 3}, "InvalidRequest", "prompt"),
        ("completions", {"prompt": ["a", 3]}, "InvalidRequest", "prompt"),
        ("completions", {"prompt": [[1], ["a"]]}, "InvalidRequest", "prompt"),
        ("completions", {"prompt": [[1], [4000]]}, "InvalidRequest", "[1].prompt"),
        ("completions", {"prompt": "a", "max_tokens": -1}, "InvalidRequest", "max_tokens"),
        ("completions", {"prompt": "a", "temperature": -1}, "InvalidRequest", "temperature"),
        ("completions", {"prompt": "a", "n": 0}, "InvalidRequest", "n"),
        ("completions", {"prompt": "a", "logprobs": VOCAB_SIZE + 1}, "InvalidRequest", "logprobs"),
        ("chat/completions", {**CHAT, "echo": True}, "UnsupportedOption", "echo"),
        ("completions", {"prompt": "a", "structured_outputs": {"whitespace_pattern": "x"}},
         "UnsupportedOption", "structured_outputs.whitespace_pattern"),
        ("chat/completions", {"messages": []}, "InvalidRequest", "messages"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "InvalidRequest", "messages[0]"),
        ("chat/completions", {**CHAT, "chat_template": "{% if %}"}, "InvalidRequest",
         "chat_template"),
        ("chat/completions", {**CHAT, "response_format": {"type": "grammar"}},
         "InvalidRequest", "response_format.type"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "InvalidRequest",
         "tool_choice"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "UnsupportedOption", "messages[0].content"),
    ],
)  # fmt: skip
def test_refusals_are_400_and_name_the_field(
    path: str, body: dict[str, Any], kind: str, field: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(f"/v1/{path}", body)
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert (error["type"], error["field"]) == (kind, field), error
            assert server.link.requests == []

    run(test)


def test_options_that_ask_for_nothing_pass() -> None:
    async def test() -> None:
        async with serving() as server:
            options = {"echo": False, "best_of": 1, "structured_outputs": None, "user": "u"}
            options |= {"response_format": {"type": "text"}, "suffix": None}
            await complete(server, prompt="a", **options)

    run(test)


def test_names_of_fields_are_replaced_as_words_alone() -> None:
    error = renamed(ContextTooLong("text is too many for a context of 8; a text", field="text"))
    assert error.message == "prompt is too many for a context of 8; a prompt"
    assert error.field == "prompt"
