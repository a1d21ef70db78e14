"""langchain-openai: a turn with tools, as an agent's loop sends it."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.clients.conftest import MODEL_NAME


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


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
