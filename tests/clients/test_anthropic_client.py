"""The anthropic package against the server: messages, tools, streams, and what it raises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.clients.conftest import MODEL_NAME

USER: Any = {"role": "user", "content": "ab"}
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "hourly": {"type": "boolean"}},
    "required": ["city", "hourly"],
    "additionalProperties": False,
}
TOOLS: Any = [{"name": "forecast", "description": "d", "input_schema": SCHEMA}]
ASKED: Any = {"model": MODEL_NAME, "max_tokens": 150}
FORCED: Any = {"type": "any", "disable_parallel_tool_use": True}


@pytest.fixture
def client(url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url, api_key="none", max_retries=0) as found:
        yield found


def test_a_message(client: Anthropic) -> None:
    found = client.messages.create(**ASKED, messages=[USER], system="Be brief.")
    assert found.type == "message" and found.stop_reason in ("end_turn", "max_tokens")
    assert found.usage.output_tokens > 0
    counted = client.messages.count_tokens(model=MODEL_NAME, messages=[USER], system="Be brief.")
    cached = found.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == found.usage.input_tokens + cached


def test_a_call_its_result_and_the_answer(client: Anthropic) -> None:
    first = client.messages.create(**ASKED, messages=[USER], tools=TOOLS, tool_choice=FORCED)
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.type == "tool_use" and call.name == "forecast"
    assert call.input["city"] in ("Oslo", "Rome")  # type: ignore[index]
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    turns: Any = [
        USER,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**ASKED, messages=turns, tools=TOOLS)
    assert answer.role == "assistant"


def test_streams(client: Anthropic) -> None:
    with client.messages.stream(**ASKED, messages=[USER]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in final.content if block.type == "text")
    assert final.usage.output_tokens > 0 and final.stop_reason
    with client.messages.stream(
        **ASKED, messages=[USER], tools=TOOLS, tool_choice=FORCED
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (call,) = stream.get_final_message().content
    assert call.type == "tool_use" and len(pieces) > 5
    assert call.input["city"] in ("Oslo", "Rome")  # type: ignore[index]


def test_the_asynchronous_client(url: str) -> None:
    async def test() -> None:
        async with (
            AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
            client.messages.stream(**ASKED, messages=[USER]) as stream,
        ):
            assert (await stream.get_final_message()).stop_reason

    asyncio.run(test())


def test_errors_are_those_of_the_package(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**ASKED, messages=[USER], extra_body={"temperature": -1})
    assert "temperature" in str(caught.value)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="another", max_tokens=1, messages=[USER])
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**ASKED, messages=[{"role": "user", "content": [image]}])
