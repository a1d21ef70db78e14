"""langchain-openai: a turn with tools, as an agent's loop sends it."""

from __future__ import annotations

from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.clients.conftest import MODEL_NAME


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class Forecast(BaseModel):
    """The weather to come."""

    city: Literal["Oslo", "Rome"]
    hourly: bool


@pytest.fixture
def model(url: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=MODEL_NAME, max_tokens=4, max_retries=0
    )


def test_a_turn_with_tools(model: ChatOpenAI) -> None:
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "call_1"}
    messages = [
        SystemMessage("Add."),
        HumanMessage("1 + 2"),
        # As a chat model returns it: calls and no text.
        AIMessage(content="", tool_calls=[call]),
        ToolMessage("3", tool_call_id="call_1"),
    ]
    reply = model.bind_tools([add]).invoke(messages)
    assert isinstance(reply, AIMessage)
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["output_tokens"] > 0
    # What came back goes in again.
    assert isinstance(model.invoke([*messages, reply, HumanMessage("again")]), AIMessage)


def test_a_stream(model: ChatOpenAI) -> None:
    chunks = list(model.stream("ab"))
    assert "".join(str(chunk.content) for chunk in chunks) is not None
    assert len(chunks) > 1


def test_a_call_that_is_forced(model: ChatOpenAI) -> None:
    longer = model.model_copy(update={"max_tokens": 1000})
    bound = longer.bind_tools([Forecast], tool_choice="required")
    reply = bound.invoke("ab")
    assert isinstance(reply, AIMessage) and reply.tool_calls
    Forecast.model_validate(reply.tool_calls[0]["args"])
    whole = None
    for chunk in bound.stream("ab"):
        whole = chunk if whole is None else whole + chunk
    assert isinstance(whole, AIMessage) and whole.tool_calls
    Forecast.model_validate(whole.tool_calls[0]["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(
    model: ChatOpenAI, method: Literal["json_schema", "function_calling", "json_mode"]
) -> None:
    longer = model.model_copy(update={"max_tokens": 1000})
    wanted = None if method == "json_mode" else Forecast
    asked = longer.with_structured_output(wanted, method=method, include_raw=True)
    found = asked.invoke("json, ab")
    if wanted is not None:
        assert isinstance(found["parsed"], Forecast), found  # type: ignore[index]
    else:
        # Any object will do, which a model that knows nothing may not end in time.
        assert found["raw"].content.lstrip().startswith("{")  # type: ignore[index]


def test_responses(url: str) -> None:
    model = ChatOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        model=MODEL_NAME,
        max_tokens=1000,
        use_responses_api=True,
        max_retries=0,
    )
    reply = model.bind_tools([Forecast], tool_choice="required").invoke("ab")
    assert isinstance(reply, AIMessage) and reply.tool_calls
    assert isinstance(model.with_structured_output(Forecast).invoke("ab"), Forecast)
