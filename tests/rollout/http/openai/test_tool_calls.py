"""Chat with tools and reasoning: what replies hold, whole and in streams, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.http_app import Server, events, run, serving
from tests.helpers.replicas import fake_config
from tests.helpers.scripted_replies import CALL, OTHER_CALL, THINKING, TOOLS, scripted
from tests.helpers.text_models import fake_text_model
from tests.helpers.tiny_tokenizer import tiny_tokenizer

USER = {"role": "user", "content": "ab"}
BODY: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 200}
NAMED = {"type": "function", "function": {"name": "now"}}


def _function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


async def reply_to(server: Server, **more: Any) -> Any:
    reply = await server.post("/v1/chat/completions", {**BODY, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def deltas_of(server: Server, **more: Any) -> list[Any]:
    """The choices of a stream's frames."""
    reply = await server.post("/v1/chat/completions", {**BODY, "stream": True, **more})
    *frames, done = events(reply.text)
    assert done is None
    return [choice for frame in frames for choice in frame["choices"]]


def joined(choices: list[Any], index: int = 0) -> dict[str, Any]:
    """The message that the deltas of a choice add up to, and how it ended."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    for choice in choices:
        if choice["index"] != index:
            continue
        delta = choice["delta"]
        found["content"] += delta.get("content") or ""
        found["reasoning"] += delta.get("reasoning_content") or ""
        assert delta.get("reasoning_content") == delta.get("reasoning")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["function"]["arguments"] == "" and call["type"] == "function"
                found["calls"][call["index"]] = {"id": call["id"], **call["function"]}
            else:
                # Nothing but a piece of the arguments follows.
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                found["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        found["finish"] = choice["finish_reason"]
    return found


def test_calls_are_told_from_content() -> None:
    async def test() -> None:
        async with serving(**scripted(f"Well.\n{CALL}\n{OTHER_CALL}")) as server:
            (choice,) = (await reply_to(server))["choices"]
            message = choice["message"]
            assert message["content"] == "Well."
            first, second = message["tool_calls"]
            assert first["type"] == "function" and first["id"] != second["id"]
            assert first["function"]["name"] == "forecast"
            assert json.loads(first["function"]["arguments"]) == {"city": "Oslo", "days": 2}
            assert second["function"] == {"name": "now", "arguments": "{}"}
            assert choice["finish_reason"] == "tool_calls"
            assert choice["weight_version"] == "0"

    run(test)


def test_content_is_null_beside_calls_alone() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL, "hi", "")) as server:
            assert (await reply_to(server))["choices"][0]["message"]["content"] is None
            (choice,) = (await reply_to(server))["choices"]
            assert choice["message"] == {"role": "assistant", "content": "hi"}
            assert choice["finish_reason"] == "stop"
            assert (await reply_to(server))["choices"][0]["message"]["content"] == ""

    run(test)


def test_a_stream_is_the_whole_reply_in_pieces() -> None:
    text = f"<think>Oslo?</think>Well.{CALL}{OTHER_CALL}"

    async def test() -> None:
        async with serving(**scripted(text, text, template=THINKING)) as server:
            options = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
            (whole,) = (await reply_to(server, **options))["choices"]
            choices = await deltas_of(server, **options)
            found = joined(choices)
            message = whole["message"]
            assert message["reasoning_content"] == message["reasoning"] == "Oslo?"
            assert found["content"] == message["content"] == "Well."
            assert found["reasoning"] == "Oslo?"
            calls = [call["function"] for call in message["tool_calls"]]
            told = [{k: call[k] for k in ("name", "arguments")} for call in found["calls"].values()]
            assert told == calls
            assert found["finish"] == whole["finish_reason"] == "tool_calls"
            # Scores and ids are those of all tokens, however their text is told.
            ids = [token for choice in choices for token in choice.get("token_ids", [])]
            assert ids == whole["token_ids"]
            entries = [
                e for choice in choices for e in (choice.get("logprobs") or {}).get("content", [])
            ]
            assert entries == whole["logprobs"]["content"] and len(entries) == len(ids)
            # Arguments come as they are written.
            pieces = [c for choice in choices for c in choice["delta"].get("tool_calls", [])]
            assert len(pieces) > 6

    run(test)


def test_only_the_first_call_where_calls_are_not_parallel() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL + OTHER_CALL)) as server:
            more = {"parallel_tool_calls": False}
            (choice,) = (await reply_to(server, **more))["choices"]
            assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["forecast"]
            assert list(joined(await deltas_of(server, **more))["calls"]) == [0]
            assert len((await reply_to(server))["choices"][0]["message"]["tool_calls"]) == 2

    run(test)


def test_what_is_no_call_here_is_content() -> None:
    unknown = CALL.replace("forecast", "unknown")

    async def test() -> None:
        async with serving(**scripted(CALL, unknown, CALL)) as server:
            (choice,) = (await reply_to(server, tool_choice="none"))["choices"]
            assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
            (choice,) = (await reply_to(server))["choices"]
            assert choice["message"] == {"role": "assistant", "content": unknown}
            (choice,) = (await reply_to(server, tools=None))["choices"]
            assert choice["message"]["content"] == CALL

    run(test)


def test_a_call_that_the_limit_cuts_off() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL)) as server:
            cut = {"max_tokens": len(CALL) - 25}
            (choice,) = (await reply_to(server, **cut))["choices"]
            assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
            assert choice["message"]["content"] == CALL[: len(CALL) - 25]
            assert joined(await deltas_of(server, **cut))["finish"] == "length"

    run(test)


def test_samples_of_one_prompt_have_calls_of_their_own() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL, "hi")) as server:
            first, second = (await reply_to(server, n=2))["choices"]
            assert first["finish_reason"] == "tool_calls" and second["finish_reason"] == "stop"
            choices = await deltas_of(server, n=2)
            assert joined(choices, 0)["finish"] == "tool_calls"
            assert joined(choices, 1)["content"] == "hi"

    run(test)


def test_reasoning_is_split_left_or_left_out() -> None:
    text = "<think>Hm.</think>\n\nYes."

    async def test() -> None:
        async with serving(**scripted(text, template=THINKING)) as server:
            found = await reply_to(server)
            message = found["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
            details = found["usage"]["completion_tokens_details"]
            assert details == {"reasoning_tokens": len("<think>Hm.</think>")}
            (choice,) = (await reply_to(server, separate_reasoning=False))["choices"]
            assert choice["message"]["content"] == text
            (choice,) = (await reply_to(server, include_reasoning=False))["choices"]
            assert choice["message"] == {"role": "assistant", "content": "Yes."}

    run(test)


def test_effort_reaches_the_template() -> None:
    async def test() -> None:
        async with serving(**scripted("Hm.</think>Yes.", "Yes.", template=THINKING)) as server:
            found = await reply_to(server, reasoning_effort="low", return_token_ids=True)
            assert tiny_tokenizer().decode(found["prompt_token_ids"]).endswith("<think>")
            message = found["choices"][0]["message"]
            assert (message["reasoning"], message["content"]) == ("Hm.", "Yes.")
            found = await reply_to(server, reasoning_effort="none", return_token_ids=True)
            assert tiny_tokenizer().decode(found["prompt_token_ids"]).endswith("<think></think>")
            assert found["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}

    run(test)


def test_parsers_by_name() -> None:
    async def test() -> None:
        plain = "{{ messages[0].content }}"
        async with serving(**scripted(CALL, template=plain, tool_parser="hermes")) as server:
            assert (await reply_to(server))["choices"][0]["message"]["tool_calls"]
        async with serving(**scripted(CALL, tool_parser="none")) as server:
            assert (await reply_to(server))["choices"][0]["message"]["content"] == CALL
            reply = await server.post("/v1/chat/completions", {**BODY, "tool_choice": "required"})
            assert reply.status_code == 400 and "--tool-parser" in reply.json()["error"]["message"]

    run(test)


def test_a_template_of_the_request_says_nothing_of_the_reply() -> None:
    async def test() -> None:
        other = "{{ messages[0].content }}[TOOL_CALLS][THINK]"
        async with serving(**scripted(CALL), trust_request_chat_template=True) as server:
            (choice,) = (await reply_to(server, chat_template=other))["choices"]
            assert choice["message"]["tool_calls"]
            body = {**BODY, "chat_template": other, "reasoning_effort": "low"}
            reply = await server.post("/v1/chat/completions", body)
            assert reply.json()["error"]["param"] == "reasoning_effort"

    run(test)


def test_special_tokens_are_there_for_the_parser_and_not_in_content() -> None:
    """The family's marks are special tokens of this model."""
    template = THINKING.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    text = "[THINK]Hm.[/THINK]Yes<|reserved_270|>."

    async def test() -> None:
        async with serving(**scripted(text, template=template)) as server:
            (choice,) = (await reply_to(server))["choices"]
            assert choice["message"]["content"] == "Yes."
            assert choice["message"]["reasoning"] == "Hm."
            assert joined(await deltas_of(server))["content"] == "Yes."
            (choice,) = (await reply_to(server, skip_special_tokens=False))["choices"]
            assert choice["message"]["content"] == "Yes<|reserved_270|>."

    run(test)


@pytest.mark.parametrize(
    ("more", "field", "kind"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "InvalidRequest"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", "InvalidRequest"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice",
         "InvalidRequest"),
        ({"tool_choice": "any"}, "tool_choice", "UnsupportedOption"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "UnsupportedOption"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "UnsupportedOption"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name",
         "InvalidRequest"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name", "InvalidRequest"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "UnsupportedOption"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "UnsupportedOption"),
        ({"tools": [_function("f", {"type": "object", "properties": {"a": {"not": {}}}})],
          "tool_choice": "required"}, "tools", "InvalidRequest"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(
    more: dict[str, Any], field: str, kind: str
) -> None:
    async def test() -> None:
        async with serving(**scripted(CALL)) as server:
            reply = await server.post("/v1/chat/completions", {**BODY, **more})
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert (error["param"], error["type"]) == (field, kind), error
            assert server.link.requests == []

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_cannot_come_are_the_fault_of_the_tools(stream: bool, tmp_path: Path) -> None:
    """No call is as long as the reply has to be."""

    async def test() -> None:
        body = {**BODY, "tool_choice": NAMED, "min_tokens": 150, "stream": stream}
        async with serving(
            engine=fake_config(fake_text_model(tmp_path)), tool_parser="hermes"
        ) as server:
            reply = await server.post("/v1/chat/completions", body)
            told = (
                [frame for frame in events(reply.text) if frame and "error" in frame]
                if stream
                else [reply.json()]
            )
            assert [(one["error"]["type"], one["error"]["param"]) for one in told] == [
                ("UnmetConstraint", "tools")
            ]

    run(test)
