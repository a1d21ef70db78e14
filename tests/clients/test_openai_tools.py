"""The openai package with tools, parsed outputs and responses: a call, its result, the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.clients.conftest import MODEL_NAME

USER: Any = {"role": "user", "content": "ab"}


class Forecast(BaseModel):
    """The weather to come."""

    city: Literal["Oslo", "Rome"]
    hourly: bool


TOOL: Any = openai.pydantic_function_tool(Forecast, name="forecast")
FLAT: Any = {"type": "function", **TOOL["function"]}
ASKED: Any = {"model": MODEL_NAME, "seed": 1, "max_tokens": 1000}


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_call_its_result_and_the_answer(client: OpenAI) -> None:
    first = client.chat.completions.create(
        **ASKED, messages=[USER], tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "forecast"
    Forecast.model_validate_json(call.function.arguments)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    again: Any = [USER, choice.message, result]
    answer = client.chat.completions.create(**ASKED, messages=again, tools=[TOOL], n=2)
    assert all(choice.message.role == "assistant" for choice in answer.choices)


def test_a_parsed_reply_and_parsed_calls(client: OpenAI) -> None:
    found = client.chat.completions.parse(**ASKED, messages=[USER], response_format=Forecast)
    assert isinstance(found.choices[0].message.parsed, Forecast)
    named: Any = {"type": "function", "function": {"name": "forecast"}}
    found_calls = client.chat.completions.parse(
        **ASKED, messages=[USER], tools=[TOOL], tool_choice=named
    )
    for call in found_calls.choices[0].message.tool_calls or []:
        assert isinstance(call.function.parsed_arguments, Forecast)
    assert found_calls.choices[0].message.tool_calls


def test_streams_of_calls_and_of_parsed_text(client: OpenAI) -> None:
    pieces, ended = [], []
    with client.chat.completions.stream(
        **ASKED, messages=[USER], tools=[TOOL], tool_choice="required"
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
            if event.type == "tool_calls.function.arguments.done":
                ended.append(event.parsed_arguments)
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert calls and len(ended) == len(calls) and len(pieces) > 5
    assert "".join(pieces) == "".join(call.function.arguments for call in calls)
    assert all(isinstance(parsed, Forecast) for parsed in ended)
    with client.chat.completions.stream(
        **ASKED, messages=[USER], response_format=Forecast
    ) as stream:
        final_text = stream.get_final_completion()
    assert isinstance(final_text.choices[0].message.parsed, Forecast)


def test_responses_with_a_call_and_its_result(client: OpenAI) -> None:
    asked: Any = {"model": MODEL_NAME, "max_output_tokens": 1000, "extra_body": {"seed": 1}}
    first = client.responses.create(**asked, input="ab", tools=[FLAT], tool_choice="required")
    assert first.status == "completed"
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls and all(json.loads(call.arguments) for call in calls)
    outputs: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        for call in calls
    ]
    second = client.responses.create(
        **asked, input=outputs, previous_response_id=first.id, tools=[FLAT]
    )
    assert isinstance(second.output_text, str) and second.usage is not None
    # A caller that keeps the conversation sends the items back.
    items: Any = [USER, *first.output, *outputs]
    loose = client.responses.create(**asked, input=items, tools=[FLAT], store=False)
    assert loose.usage is not None and loose.usage.input_tokens == second.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    listed = client.responses.input_items.list(second.id).data
    assert [item.type for item in listed] == ["function_call_output"] * len(calls)
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(first.id)


def test_responses_parsed_and_streamed(client: OpenAI) -> None:
    asked: Any = {"model": MODEL_NAME, "max_output_tokens": 1000, "input": "ab"}
    parsed = client.responses.parse(**asked, text_format=Forecast)
    assert isinstance(parsed.output_parsed, Forecast)
    with client.responses.stream(**asked, text_format=Forecast) as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Forecast) and final.output_text == text
    with client.responses.stream(**asked, tools=[FLAT], tool_choice="required") as stream:
        arguments = "".join(
            event.delta
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        )
        calls = [item for item in stream.get_final_response().output if hasattr(item, "call_id")]
    assert arguments == "".join(call.arguments for call in calls) and calls


def test_the_asynchronous_client(url: str) -> None:
    async def test() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            async with client.chat.completions.stream(
                **ASKED, messages=[USER], response_format=Forecast
            ) as stream:
                final = await stream.get_final_completion()
            assert isinstance(final.choices[0].message.parsed, Forecast)
            async with client.responses.stream(
                model=MODEL_NAME, input="ab", max_output_tokens=1000, text_format=Forecast
            ) as responses:
                response = await responses.get_final_response()
            assert isinstance(response.output_parsed, Forecast)
            replies = await asyncio.gather(
                *(client.chat.completions.create(**ASKED, messages=[USER]) for _ in range(4))
            )
            assert len({reply.id for reply in replies}) == 4

    asyncio.run(test())


def test_what_is_not_served_is_told_by_name(client: OpenAI) -> None:
    for call in (
        lambda: client.responses.create(model=MODEL_NAME, input="a", background=True),
        lambda: client.responses.create(
            model=MODEL_NAME, input="a", tools=[{"type": "web_search"}]
        ),
        lambda: client.chat.completions.create(
            model=MODEL_NAME, messages=[USER], tools=[TOOL], reasoning_effort="high"
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param in ("background", "tools[0].type", "reasoning_effort")
