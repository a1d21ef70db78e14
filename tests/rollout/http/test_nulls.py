"""A null is as if its field were not there: every field of every body, and of files of requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from engine.errors import InvalidRequest
from engine.protocol import Command, GenerateRequest
from rollout.http.app import build_routes
from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.native.generate_call import parse_call
from rollout.http.openai.bodies import ChatBody, CompletionBody
from rollout.http.services import make_services
from rollout.offline import run_file
from rollout.requests.json_types import decode_json
from tests.helpers.http_app import InlineLink, Server, run, serving
from tests.helpers.replicas import fake_config, inline
from tests.helpers.struct_fields import example, paths
from tests.helpers.tiny_tokenizer import tiny_tokenizer

BODIES: dict[str, dict[str, Any]] = {
    "/generate": {
        "text": "ab",
        "sampling_params": {"max_new_tokens": 3, "sampling_seed": 3, "top_k": 5, "stop": "!"},
        "return_logprob": True,
        "rid": "r",
    },
    "/v1/completions": {
        "prompt": "ab",
        "max_tokens": 3,
        "logprobs": 1,
        "seed": 3,
        "top_k": 5,
        "stop": "!",
        "request_id": "r",
        "stream_options": {"include_usage": True},
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "ab"}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "seed": 3,
        "request_id": "r",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "stream_options": {"include_usage": True},
    },
}
KINDS = {
    "/generate": GenerateRequest,
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}
# Known to the dialect and no fields here.
_OTHERS = ("user", "functions", "modalities", "lora_path", "guided_decoding_backend")


def body_kinds() -> Iterator[type[msgspec.Struct]]:
    """Every struct that a route of the server reads a body into, the commands one by one."""
    config = ServeConfig(engine=fake_config())
    app = build_routes(make_services(config, AsyncEngine(InlineLink(config.engine)), None))
    found: dict[type[msgspec.Struct], None] = {}
    for route in app.routes:
        kind = (getattr(route, "openapi_extra", None) or {}).get("body")
        kinds = kind if isinstance(kind, tuple) else (kind,) if kind else ()
        for one in (one for kind in kinds for one in getattr(kind, "__args__", [kind])):
            found[one] = None
    yield from found


def placed(body: dict[str, Any], path: tuple[str, ...], *, null: bool) -> dict[str, Any]:
    """The body with a null at a path, or without anything there."""
    name, *rest = path
    if rest:
        inner = body.get(name)
        inner = inner if isinstance(inner, dict) else {}
        return {**body, name: placed(inner, tuple(rest), null=null)}
    kept = {key: value for key, value in body.items() if key != name}
    return {**kept, name: None} if null else kept


def outcome(decode: Any, body: dict[str, Any]) -> Any:
    """What a body decodes to, or the error that it gets."""
    try:
        return decode(json.dumps(body).encode())
    except InvalidRequest as error:
        return type(error), error.field, error.message


@pytest.mark.parametrize("kind", list(body_kinds()), ids=lambda kind: kind.__name__)
def test_null_at_any_field_of_any_body_is_its_default(kind: type[msgspec.Struct]) -> None:
    is_command = kind.__struct_config__.tag is not None
    read = Command if is_command else kind
    base = example(kind)
    for path in paths(kind):
        found, expected = (
            outcome(
                lambda data: msgspec.to_builtins(decode_json(data, read, strict=False)),
                placed(base, path, null=null),
            )
            for null in (True, False)
        )
        assert found == expected, path


def test_there_are_many_bodies() -> None:
    kinds = list(body_kinds())
    assert len(kinds) > 30
    assert {GenerateRequest, CompletionBody, ChatBody} <= set(kinds)


@pytest.mark.parametrize("path", BODIES)
def test_null_at_any_field_of_a_request_is_answered_as_without(path: str) -> None:
    async def answer(server: Server, body: dict[str, Any]) -> Any:
        reply = await server.post(path, body)
        found = reply.json()
        if isinstance(found, dict):
            for name in ("created", "id"):
                found.pop(name, None)
            found.get("meta_info", {}).pop("id", None)
        return reply.status_code, _without_times(found)

    async def test() -> None:
        async with serving() as server:
            fields = [*paths(KINDS[path]), *((name,) for name in _OTHERS)]
            for field in fields:
                found, expected = [
                    await answer(server, placed(BODIES[path], field, null=null))
                    for null in (True, False)
                ]
                assert found == expected, field
                assert found[0] == 200 or field[0] in ("prompt", "messages", "text"), found

    run(test)


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    if isinstance(value, dict):
        timed = ("e2e_latency", "first_token", "_ts", "queue_time", "throughput", "cached_tokens")
        return {
            key: _without_times(item)
            for key, item in value.items()
            if not any(mark in key for mark in timed) and key != "prompt_tokens_details"
        }
    return value


def test_nulls_in_a_batch() -> None:
    body = {
        "text": ["a", "b"],
        "rid": None,
        "sampling_params": [None, {"n": None, "max_new_tokens": 3}],
        "priority": [None, 4],
    }
    first, second = parse_call(json.dumps(body).encode()).items
    assert (first.sampling_params.max_new_tokens, first.priority) == (128, 0)
    assert (second.sampling_params.max_new_tokens, second.priority) == (3, 4)


def test_nulls_in_a_file_of_requests(tmp_path: Any) -> None:
    base = BODIES["/generate"] | {"rid": None}
    lines = [placed(base, path, null=True) for path in paths(GenerateRequest) if path != ("text",)]
    lines.append({**base, "lora_path": None})
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replica = inline()
    try:
        report = run_file(replica, tiny_tokenizer(), source, out, seed=1)
    finally:
        replica.close()
    assert (report.num_lines, report.num_errors) == (len(lines), 0), out.read_text()


def test_what_is_no_field_keeps_its_nulls() -> None:
    schema = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    body = {"messages": [{"role": "user", "content": None}], "tools": [schema], "n": None}
    found = decode_json(json.dumps(body), ChatBody)
    assert found.messages == body["messages"] and found.tools == [schema] and found.n == 1


def test_text_that_says_null_is_left_alone() -> None:
    found = decode_json('{"text": "null, \\"n\\": null", "rid": null}', GenerateRequest)
    assert (found.text, found.rid) == ('null, "n": null', None)
