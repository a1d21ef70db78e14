"""Conversations as agents send them, over HTTP: the prompt is the one that recipes write."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.chat_templates import LLAMA3, QWEN25, TOLD_BY_NONE, TOOL_LOOP, UNGUARDED
from tests.helpers.http_app import run, serving
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": "forecast", "description": None, "parameters": {}, "strict": None},
    }
]


@pytest.mark.parametrize("template", [QWEN25, LLAMA3, UNGUARDED, TOLD_BY_NONE])
def test_a_tool_loop_has_the_ids_that_a_recipe_gives_it(template: str) -> None:
    tokenizer = tiny_tokenizer(template=template)
    expected = tokenizer.apply_chat_template(TOOL_LOOP, tools=TOOLS)
    text = tokenizer.decode(expected)
    assert "None" not in text and '\\"city\\"' not in text and '"city"' in text

    async def test() -> None:
        async with serving(engine=fake_config(num_pages=2000), tokenizer=tokenizer) as server:
            body: dict[str, Any] = {"messages": TOOL_LOOP, "tools": TOOLS, "max_tokens": 2}
            body |= {"return_token_ids": True, "tool_choice": "auto", "response_format": None}
            found = await server.post("/v1/chat/completions", body)
            assert found.status_code == 200, found.text
            assert found.json()["prompt_token_ids"] == expected
            # The answer, dumped as a client would, is the next turn of the conversation.
            said = found.json()["choices"][0]["message"]
            dumped = {**said, "refusal": None, "annotations": None, "tool_calls": None}
            more = [*TOOL_LOOP, dumped, {"role": "user", "content": "more"}]
            reply = await server.post("/v1/chat/completions", {**body, "messages": more})
            assert reply.status_code == 200, reply.text
            plain = [*TOOL_LOOP, said, more[-1]]
            ids = tokenizer.apply_chat_template(plain, tools=TOOLS)
            assert reply.json()["prompt_token_ids"] == ids

    run(test)


def test_a_template_of_the_request_gets_the_same_messages() -> None:
    tokenizer = tiny_tokenizer(template=QWEN25)

    async def test() -> None:
        async with serving(
            engine=fake_config(num_pages=2000),
            tokenizer=tiny_tokenizer(template=UNGUARDED),
            trust_request_chat_template=True,
        ) as server:
            body = {"messages": TOOL_LOOP, "max_tokens": 2, "return_token_ids": True}
            reply = await server.post("/v1/chat/completions", {**body, "chat_template": QWEN25})
            assert reply.status_code == 200, reply.text
            assert reply.json()["prompt_token_ids"] == tokenizer.apply_chat_template(TOOL_LOOP)

    run(test)


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[4].content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[4].content"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[4].audio"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]},
         "messages[4].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
         "messages[4].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_a_turn_that_is_no_text_is_refused_by_name(turn: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with serving(tokenizer=tiny_tokenizer(template=QWEN25)) as server:
            body = {"messages": [*TOOL_LOOP, turn], "max_tokens": 2}
            reply = await server.post("/v1/chat/completions", body)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == param

    run(test)


def test_variables_of_a_template_that_are_null_are_not_there() -> None:
    template = "{{ messages[0].content }}{% if mood is defined %}{{ mood }}{% endif %}"

    async def test() -> None:
        async with serving(tokenizer=tiny_tokenizer(template=template)) as server:
            body = {"messages": [{"role": "user", "content": "ab"}], "return_token_ids": True}
            body["max_tokens"] = 1
            for variables in ({"mood": None, "tools": None}, None, {}):
                sent = {**body, "chat_template_kwargs": variables}
                found = (await server.post("/v1/chat/completions", sent)).json()
                assert found["prompt_token_ids"] == tiny_tokenizer().encode("ab"), found
            sent = {**body, "chat_template_kwargs": {"tools": []}}
            error = (await server.post("/v1/chat/completions", sent)).json()["error"]
            assert error["param"] == "chat_template_kwargs.tools"

    run(test)
