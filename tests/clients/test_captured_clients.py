"""The openai and anthropic packages below the base URL of a rollout, knowing nothing of it."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
from openai import OpenAI

from tests.clients.conftest import MODEL_NAME
from tests.clients.test_openai_client import TOOLS, USER
from tests.helpers.tiny_tokenizer import EOS_ID, IM_END_ID


def record(url: str, rollout: dict[str, Any]) -> dict[str, Any]:
    found = httpx.get(f"{url}/rollouts/{rollout['id']}", timeout=60).raise_for_status().json()
    return dict(found)


def test_an_agent_of_the_openai_package(url: str) -> None:
    """A turn with a call of a tool, its result, a streamed turn."""
    rollout = httpx.post(f"{url}/rollouts", json={}, timeout=60).raise_for_status().json()
    more = {"ignore_eos": True}
    with OpenAI(base_url=url + rollout["base_url"], api_key="none", max_retries=0) as client:
        assert client.models.list().data[0].id == MODEL_NAME
        messages: list[Any] = [USER]
        forced = {"type": "function", "function": {"name": "add"}}
        # A call that ends as the template ends a message; by the other end it would be a branch.
        reply = client.chat.completions.create(
            model=MODEL_NAME,
            messages=messages,
            tools=TOOLS,
            tool_choice=forced,
            max_tokens=400,
            logit_bias={str(EOS_ID): -100},
            extra_body={"stop_token_ids": [IM_END_ID]},
        )
        said = reply.choices[0].message
        messages.append(said)
        for call in said.tool_calls or []:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "5"})
        messages.append({"role": "user", "content": "on"})
        text = ""
        for chunk in client.chat.completions.create(
            model=MODEL_NAME,
            messages=messages,
            tools=TOOLS,
            max_tokens=6,
            stream=True,
            extra_body=more,
        ):
            text += chunk.choices[0].delta.content or ""
        messages += [{"role": "assistant", "content": text}, USER]
        client.chat.completions.create(
            model=MODEL_NAME, messages=messages, tools=TOOLS, max_tokens=6, extra_body=more
        )
    found = record(url, rollout)
    assert found["complete"] and found["num_calls"] == 3
    (branch,) = found["branches"]
    assert [s["call"] for s in branch["segments"] if s["sampled"]] == [0, 1, 2]


def test_an_agent_of_the_anthropic_package(url: str) -> None:
    rollout = httpx.post(f"{url}/rollouts", json={}, timeout=60).raise_for_status().json()
    # This client adds the v1 by itself.
    base = url + rollout["base_url"].removesuffix("/v1")
    with anthropic.Anthropic(base_url=base, api_key="none", max_retries=0) as client:
        messages: list[Any] = [USER]
        for _ in range(2):
            reply = client.messages.create(model=MODEL_NAME, messages=messages, max_tokens=6)
            messages += [{"role": "assistant", "content": reply.content}, USER]
    found = record(url, rollout)
    assert found["complete"] and found["num_calls"] == 2
