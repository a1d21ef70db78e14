"""The openai package against the server: what it parses, and what it raises."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.clients.conftest import MODEL_NAME

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            },
        },
    }
]
USER = {"role": "user", "content": "ab"}


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.id == MODEL_NAME
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_with_logprobs(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL_NAME, prompt="ab", max_tokens=4, logprobs=2, temperature=0, seed=1
    )
    (choice,) = reply.choices
    assert choice.finish_reason in ("length", "stop")
    assert reply.usage is not None
    assert choice.logprobs is not None
    size = reply.usage.completion_tokens
    assert len(choice.logprobs.tokens or []) == len(choice.logprobs.token_logprobs or []) == size
    assert all(value <= 0 for value in choice.logprobs.token_logprobs or [])


def test_a_chat_with_logprobs_and_its_stream(client: OpenAI) -> None:
    asked = {"model": MODEL_NAME, "messages": [USER], "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert whole.usage is not None
    assert len(entries) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    text, usage = "", None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        text += "".join(found.delta.content or "" for found in chunk.choices)
    assert text == choice.message.content
    assert usage == whole.usage or usage.completion_tokens == whole.usage.completion_tokens


def test_a_turn_with_tools_goes_back_as_model_dump_gives_it(client: OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "add", "arguments": json.dumps({"a": 1, "b": 2})},
    }
    message = openai.types.chat.ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": None, "tool_calls": [call]}
    )
    result = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    for dumped in (message.model_dump(), message.model_dump(exclude_none=True), message):
        reply = client.chat.completions.create(
            model=MODEL_NAME, messages=[USER, dumped, result], tools=TOOLS, max_tokens=3
        )
        assert reply.choices[0].message.role == "assistant"
    again = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[USER, reply.choices[0].message.model_dump(), USER],
        max_tokens=3,
    )
    assert again.choices[0].message.content is not None


def test_errors_are_those_of_the_package(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL_NAME, prompt="a", temperature=-1)
    assert caught.value.status_code == 400
    assert caught.value.type
    assert "temperature" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL_NAME, prompt="a" * 100_000)


def test_embeddings_are_decoded_and_have_length_one(client: OpenAI) -> None:
    """The package asks for base64 where nothing is said, and decodes it."""
    reply = client.embeddings.create(model=MODEL_NAME, input=["ab", "cde"])
    assert [entry.index for entry in reply.data] == [0, 1]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0
    plain = client.embeddings.create(model=MODEL_NAME, input=["ab", "cde"], encoding_format="float")
    for entry, other in zip(reply.data, plain.data, strict=True):
        assert entry.embedding == pytest.approx(other.embedding, abs=1e-5)
        assert sum(x * x for x in entry.embedding) == pytest.approx(1.0)
    (short,) = client.embeddings.create(model=MODEL_NAME, input=[5, 6], dimensions=4).data
    assert len(short.embedding) == 4
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=MODEL_NAME, input="ab", dimensions=1 << 20)
