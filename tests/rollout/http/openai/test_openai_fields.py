"""Fields of OpenAI's routes: what is unknown or not served is refused by name, once it asks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.http_app import Server, run, serving

COMPLETION = {"prompt": "ab", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROUTES = {"completions": COMPLETION, "chat/completions": CHAT}


async def error_of(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = await server.post(f"/v1/{path}", body)
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error["param"] == error["field"]
    assert server.link.requests == []
    return error


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("sampling_seed", "seed"),
        ("rid", "request_id"),
        ("stop_token_id", "stop_token_ids"),
        ("streem", "stream"),
        ("presence_penality", "presence_penalty"),
        ("respons_format", "response_format"),
    ],
)
def test_a_misspelt_field_names_the_one_that_was_meant(path: str, name: str, meant: str) -> None:
    async def test() -> None:
        async with serving() as server:
            error = await error_of(server, path, {**ROUTES[path], name: 0})
            assert (error["type"], error["param"]) == ("InvalidRequest", name)
            assert f"did you mean {meant}?" in error["message"]

    run(test)


@pytest.mark.parametrize(
    ("path", "more", "field", "kind"),
    [
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities", "UnsupportedOption"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio", "UnsupportedOption"),
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions", "UnsupportedOption"),
        ("chat/completions", {"function_call": {"name": "f"}}, "function_call",
         "UnsupportedOption"),
        ("chat/completions", {"prediction": {"type": "content"}}, "prediction",
         "UnsupportedOption"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort",
         "UnsupportedOption"),
        ("chat/completions", {"verbosity": "low"}, "verbosity", "UnsupportedOption"),
        ("chat/completions", {"web_search_options": {"user_location": "x"}},
         "web_search_options", "UnsupportedOption"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format.type",
         "InvalidRequest"),
        ("chat/completions", {"echo": True}, "echo", "UnsupportedOption"),
        ("chat/completions", {"add_special_tokens": True}, "add_special_tokens",
         "UnsupportedOption"),
        ("chat/completions", {"stream_options": {"include_usge": True}},
         "stream_options.include_usge", "InvalidRequest"),
        ("chat/completions", {"prompt": "a"}, "prompt", "InvalidRequest"),
        ("completions", {"messages": []}, "messages", "InvalidRequest"),
        ("completions", {"suffix": "x"}, "suffix", "UnsupportedOption"),
        ("completions", {"guided_json": {}, "guided_regex": "a"}, "guided_regex",
         "InvalidRequest"),
        ("completions", {"guided_decoding_backend": "x"}, "guided_decoding_backend",
         "UnsupportedOption"),
        ("completions", {"lora_path": "x"}, "lora_path", "UnsupportedOption"),
        ("completions", {"length_penalty": 0.5}, "length_penalty", "UnsupportedOption"),
        ("completions", {"extra_body": {"top_k": 1}}, "extra_body", "InvalidRequest"),
        ("completions", {"x" * 3000: 1}, "x" * 3000, "InvalidRequest"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(
    path: str, more: dict[str, Any], field: str, kind: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            error = await error_of(server, path, {**ROUTES[path], **more})
            assert (error["type"], error["param"]) == (kind, field)

    run(test)


@pytest.mark.parametrize(
    ("path", "more", "field", "said"),
    [
        ("completions", {"min_tokens": 3}, "min_tokens", "above max_tokens 2"),
        ("chat/completions", {"min_tokens": 3}, "min_tokens", "above max_tokens 2"),
        ("completions", {"logprobs": 10**6}, "logprobs", "logprobs is 1000000"),
        ("completions", {"prompt_logprobs": 10**6}, "prompt_logprobs", "prompt_logprobs is"),
        ("completions", {"prompt_logprobs": 10**6, "logprobs": 1}, "prompt_logprobs", "is 1000000"),
        (
            "chat/completions",
            {"logprobs": True, "top_logprobs": 10**6},
            "top_logprobs",
            "top_logprobs is",
        ),
        ("chat/completions", {"prompt_logprobs": 10**6}, "prompt_logprobs", "prompt_logprobs is"),
    ],
)
def test_a_number_out_of_range_names_the_field_that_was_sent(
    path: str, more: dict[str, Any], field: str, said: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            error = await error_of(server, path, {**ROUTES[path], **more})
            assert error["param"] == field
            assert said in error["message"]

    run(test)


def test_what_asks_for_nothing_or_changes_nothing_passes() -> None:
    told = {
        "user": "u",
        "metadata": {"run": "1"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "temprature": None,
        "suffix": None,
        "best_of": None,
        "n": None,
        "guided_json": None,
        "length_penalty": 1.0,
    }
    chat = {
        "modalities": ["text"],
        "audio": None,
        "functions": [],
        "function_call": "auto",
        "parallel_tool_calls": True,
        "tools": TOOLS,
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": None, "include_obfuscation": False},
        "verbosity": "medium",
    }

    async def test() -> None:
        async with serving() as server:
            for path, more in (("completions", told), ("chat/completions", {**told, **chat})):
                reply = await server.post(f"/v1/{path}", {**ROUTES[path], **more})
                assert reply.status_code == 200, reply.text
            single = {"parallel_tool_calls": False}
            assert (await server.post("/v1/chat/completions", {**CHAT, **single})).is_success

    run(test)
