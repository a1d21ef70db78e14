"""`allowed_token_ids` in every dialect: only these come, and what cannot be served is refused by
its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest, SamplingParams
from engine.protocol.types import MAX_ALLOWED_IDS
from rollout.http.native.generate_call import parse_call
from rollout.offline import run_file
from rollout.requests.expand import expand
from tests.helpers.fake_executor import VOCAB_SIZE, expected_tokens
from tests.helpers.http_app import events, run, serving
from tests.helpers.mask_sources import NEVER, Broken, ScriptedSource
from tests.helpers.replicas import fake_config, inline

PROMPT = [1, 2, 3]
ALLOWED = [5, 50, 90]
WANT = expected_tokens(PROMPT, 4, allowed=ALLOWED)
FOUR = {"max_new_tokens": 4}
NATIVE = {"input_ids": PROMPT, "sampling_params": FOUR}
COMPLETION = {"prompt": PROMPT, "max_tokens": 4, "return_token_ids": True}
CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "return_token_ids": True}
TOKENS = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4}}


def body_of(path: str, ids: Any) -> dict[str, Any]:
    field = {"allowed_token_ids": ids}
    match path:
        case "/generate":
            return NATIVE | field
        case "/v1/completions":
            return COMPLETION | field
        case "/v1/chat/completions":
            return CHAT | field
    return {**TOKENS, "sampling_params": {"max_tokens": 4, **field}}


PATHS = ["/generate", "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"]


@pytest.mark.parametrize("path", PATHS)
def test_every_dialect_samples_what_is_allowed(path: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(path, body_of(path, ALLOWED))
            assert reply.status_code == 200, reply.text
            (request,) = server.link.requests
            assert request.allowed_token_ids.tolist() == ALLOWED
            found = reply.json()
            ids = found["output_ids"] if path == "/generate" else found["choices"][0]["token_ids"]
            if path == "/v1/chat/completions":
                prompt = request.prompt_ids.tolist()
                assert ids == expected_tokens(prompt, 4, allowed=ALLOWED)
            else:
                assert ids == WANT

    run(test)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "ids,said",
    [
        ([], "leave it out"),
        ([VOCAB_SIZE], f"[0, {VOCAB_SIZE})"),
        ([5, -1], f"[0, {VOCAB_SIZE})"),
        ([1] * (MAX_ALLOWED_IDS + 1), ""),
        (5, ""),
        (["a"], ""),
        ([[1]], ""),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(path: str, ids: Any, said: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(path, body_of(path, ids))
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert error["type"] == "InvalidRequest"
            assert "allowed_token_ids" in error["field"] and said in error["message"]
            assert server.link.requests == []

    run(test)


@pytest.mark.parametrize("path", PATHS)
def test_a_null_is_no_field(path: str) -> None:
    async def test() -> None:
        async with serving() as server:
            assert (await server.post(path, body_of(path, None))).status_code == 200
            assert server.link.requests[0].allowed_token_ids is None

    run(test)


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {"5": -1e9}},
        {"min_new_tokens": 2},
        {"min_new_tokens": 2, "stop_token_ids": [7]},
    ],
)
def test_a_bias_or_a_minimum_beside_it_is_no_contradiction(sampling: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": PROMPT, "allowed_token_ids": [5, 7]}
            reply = await server.post("/generate", {**body, "sampling_params": FOUR | sampling})
            assert reply.status_code == 200 and set(reply.json()["output_ids"]) <= {5, 7}

    run(test)


def test_what_its_own_sampling_rules_out_is_refused() -> None:
    async def test() -> None:
        async with serving() as server:
            sampling = FOUR | {"min_new_tokens": 2, "stop_token_ids": [5, 6]}
            body = {"input_ids": PROMPT, "sampling_params": sampling, "allowed_token_ids": [6, 5]}
            error = (await server.post("/generate", body)).json()["error"]
            assert error["field"] == "allowed_token_ids" and "min_new_tokens" in error["message"]
            # Beyond the minimum they may come.
            going_on = await server.post("/generate", {**body, "output_ids": [9, 9]})
            assert going_on.json()["output_ids"][0] in (5, 6)

    run(test)


@pytest.mark.parametrize(
    "ids,want",
    [
        ([7, 8], [[7, 8], [7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
        ([None, [9]], [None, [9]]),
        (None, [None, None]),
    ],
)
def test_in_a_batch_they_are_those_of_all_items_or_of_each(ids: Any, want: list[Any]) -> None:
    body = {"input_ids": [[1], [2]], "sampling_params": FOUR, "allowed_token_ids": ids}
    call = parse_call(json.dumps(body).encode())
    assert [item.allowed_token_ids for item in call.items] == want


@pytest.mark.parametrize("field", ["allowed_token_ids", "token_ids_logprob"])
def test_a_list_for_all_items_is_one_object_however_many_they_are(field: str) -> None:
    body = {"input_ids": [[1]] * 3, "sampling_params": FOUR, field: list(range(1000))}
    lists = [getattr(item, field) for item in parse_call(json.dumps(body).encode()).items]
    assert lists[0] == body[field] and all(ids is lists[0] for ids in lists)


def test_a_bad_item_of_a_batch_is_named() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [[1], [2]], "allowed_token_ids": [[1], [VOCAB_SIZE]]}
            error = (await server.post("/generate", body)).json()["error"]
            assert error["field"] == "[1].allowed_token_ids"

    run(test)


def test_a_field_in_the_wrong_place_is_sent_to_the_right_one() -> None:
    async def test() -> None:
        async with serving() as server:
            sampling = {"allowed_token_ids": [1]}
            reply = await server.post("/generate", {"text": "a", "sampling_params": sampling})
            error = reply.json()["error"]
            assert "write allowed_token_ids beside sampling_params" in error["message"]

    run(test)


def test_samples_and_streams() -> None:
    async def test() -> None:
        async with serving() as server:
            many = {**NATIVE, "sampling_params": FOUR | {"n": 3}, "allowed_token_ids": ALLOWED}
            replies = (await server.post("/generate", many)).json()
            assert [reply["output_ids"] for reply in replies] == [WANT] * 3
            first, *others = server.link.requests
            assert all(other.allowed_token_ids is first.allowed_token_ids for other in others)
            stream = {**NATIVE, "allowed_token_ids": ALLOWED, "stream": True}
            frames = events((await server.post("/generate", stream)).text)
            assert frames[-2]["output_ids"] == WANT

    run(test)


@pytest.mark.parametrize(
    "fate,kind,status",
    [((NEVER, [1]), "MaskTimeout", 504), ((0, Broken("a bug")), "MaskError", 500)],
)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_mask_that_fails_is_a_typed_error_and_the_next_request_is_served(
    path: str, fate: Any, kind: str, status: int
) -> None:
    def rule(rid: str, outputs: list[int]) -> Any:
        return fate if len(outputs) == 2 else (0, None)

    async def test() -> None:
        config = fake_config()
        scheduler = replace(config.scheduler, mask_timeout_s=0.02)
        async with serving(engine=replace(config, scheduler=scheduler)) as server:
            sources = server.link.leader._masked._gate._sources
            sources.append(ScriptedSource(rule, prefix=""))
            reply = await server.post(path, body_of(path, ALLOWED))
            assert reply.status_code == status
            assert reply.json()["error"]["type"] == kind
            sources.pop()
            assert (await server.post(path, body_of(path, ALLOWED))).status_code == 200

    run(test)


def test_lines_of_a_file_have_it_too(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [NATIVE | {"allowed_token_ids": ids} for ids in (ALLOWED, [])]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with inline() as replica:
        run_file(replica, None, source, target, seed=0)
    first, second = map(json.loads, target.read_text().splitlines())
    assert first["output_ids"] == WANT
    assert second["error"]["field"] == "allowed_token_ids"


def test_requests_made_in_process_are_checked_alike() -> None:
    with inline() as replica:
        state = replica.state()
    wire = GenerateRequest(input_ids=PROMPT, sampling_params=SamplingParams(max_new_tokens=4))
    for ids in ([], [VOCAB_SIZE], [-1], [1] * (MAX_ALLOWED_IDS + 1), [2**40]):
        with pytest.raises(InvalidRequest) as caught:
            expand(msgspec.structs.replace(wire, allowed_token_ids=ids), None, state, 0)
        assert caught.value.field == "allowed_token_ids"
    (found,) = expand(msgspec.structs.replace(wire, allowed_token_ids=[4, 4]), None, state, 0)
    assert found.allowed_token_ids.dtype == np.int32
