"""What one call may ask for, and what it does to the others: nothing."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from rollout.http.native.generate_call import parse_call
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import Server, run, serving, until
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import tiny_tokenizer

CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2}
CHAT_PATH = "/v1/chat/completions"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def small_engine(**scheduler: int) -> EngineConfig:
    config = fake_config(max_waiting=40)
    return replace(config, scheduler=replace(config.scheduler, **scheduler))


async def refused(server: Server, path: str, body: Any, field: str, status: int = 400) -> str:
    reply = await server.post(path, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["field"]) == (status, field), error
    assert server.link.requests == []
    return str(error["message"])


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"text": "a", "sampling_params": {"n": 17}}, "n"),
        ("/generate", {"text": "a", "sampling_params": {"n": 2**31 - 1}}, "n"),
        ("/generate", {"text": "a", "sampling_params": {"n": 2**31}}, "sampling_params.n"),
        ("/v1/completions", {"prompt": "a", "n": 17}, "n"),
        (CHAT_PATH, {**CHAT, "n": 300_000}, "n"),
        # Sixteen of each could wait; the call as a whole cannot.
        ("/generate", {"input_ids": [[1]] * 5, "sampling_params": {"n": 16}}, "n"),
        ("/generate", {"input_ids": [[1]] * 41}, "input_ids"),
        ("/generate", {"text": ["a"] * 41}, "text"),
        ("/v1/completions", {"prompt": ["a"] * 41}, "prompt"),
    ],
)
def test_samples_that_can_never_be_admitted_are_400(path: str, body: Any, field: str) -> None:
    async def test() -> None:
        async with serving(engine=small_engine(max_samples=16)) as server:
            await refused(server, path, body, field)

    run(test)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_as_many_as_may_wait_are_served(path: str) -> None:
    async def test() -> None:
        async with serving(engine=small_engine(max_samples=16, max_running=4)) as server:
            body = {"text": ["ab"] * 20, "sampling_params": {"n": 2, "max_new_tokens": 2}}
            if path == "/v1/completions":
                body = {"prompt": ["ab"] * 20, "n": 2, "max_tokens": 2}
            found = (await server.post(path, body)).json()
            assert len(found if path == "/generate" else found["choices"]) == 40

    run(test)


def test_what_cannot_wait_now_is_refused_before_it_is_expanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with serving(engine=small_engine(max_running=4)) as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            body = {"input_ids": [[1]] * 40, "sampling_params": {"max_new_tokens": 2}}
            first = asyncio.ensure_future(server.post("/generate", body))
            await until(lambda: server.engine.num_open == 40)
            monkeypatch.setattr("rollout.http.native.generator.expand", None)
            reply = await server.post("/generate", {"input_ids": [[1]] * 5})
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "QueueFull")
            monkeypatch.undo()
            assert len(server.link.requests) == 40
            await server.post("/continue_generation")
            assert len((await first).json()) == 40

    run(test)


def many(count: int) -> dict[str, Any]:
    return {"input_ids": [[1, 2]] * count, "sampling_params": {"max_new_tokens": 2}}


def test_others_are_served_while_a_large_call_is_taken_in() -> None:
    async def test() -> None:
        async with serving(engine=fake_config(max_waiting=4000, num_pages=4096)) as server:
            large = asyncio.ensure_future(server.post("/generate", many(4000)))
            await until(lambda: server.link.requests != [])
            assert len(server.link.requests) < 1000
            small = await server.post("/generate", {**many(1), "rid": ["small"]})
            assert small.json()[0]["output_ids"] == expected_tokens([1, 2], 2)
            order = [request.rid for request in server.link.requests]
            assert order.index("small") < 3000
            assert len((await large).json()) == 4000
            assert server.engine.num_open == 0

    run(test)


@pytest.mark.parametrize("count", [2000, 5000, 2**31 - 1])
def test_a_count_that_is_refused_keeps_no_room_from_others(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parted(*_: object, **__: object) -> None:
        raise AssertionError("it was to be expanded beside the event loop, others kept out")

    async def test() -> None:
        async with serving(engine=fake_config(max_waiting=4000)) as server:
            monkeypatch.setattr(server.services.generator.workers, "run", parted)
            body = {"input_ids": [1, 2], "sampling_params": {"n": count}}
            reply = await server.post("/generate", body)
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, "n")
            both = {"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": count}]}
            reply = await server.post("/generate", both)
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, "[1].n")

    run(test)


@pytest.mark.parametrize("how", ["leaves", "aborted", "dead"])
def test_a_large_call_that_ends_while_it_is_taken_in_leaves_nothing(how: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(max_waiting=4000, num_pages=4096)) as server:
            large = asyncio.ensure_future(server.post("/generate", many(4000)))
            await until(lambda: server.link.requests != [])
            if how == "leaves":
                large.cancel()
                await asyncio.gather(large, return_exceptions=True)
                await until(lambda: server.engine.num_open == 0)
                assert len(server.link.requests) < 4000
            elif how == "aborted":
                await server.post("/abort_request", {"abort_all": True})
                found = [e["meta_info"]["finish_reason"]["type"] for e in (await large).json()]
                assert found.count("abort") > 2000
            else:
                server.link.die()
                assert (await large).status_code == 503
                return
            await until(lambda: server.engine.num_open == 0)
            assert (await server.post("/generate", many(1))).status_code == 200

    run(test)


@pytest.mark.parametrize("items", [1, 2, 64])
def test_likeliest_tokens_are_bounded_over_a_whole_call(
    items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.requests.expand.MAX_TOP_ENTRIES", 64 * 2)

    async def test() -> None:
        async with serving() as server:
            body = {**many(items), "return_logprob": True, "top_logprobs_num": 64 // items}
            assert (await server.post("/generate", body)).status_code == 200
            server.link.requests.clear()
            body["top_logprobs_num"] += 1
            field = "top_logprobs_num"
            error = (await server.post("/generate", body)).json()["error"]
            assert (error["code"], error["field"].rpartition(".")[2]) == (400, field)
            assert server.link.requests == []

    run(test)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"stop": ["a"] * 129}, "sampling_params.stop"),
        ({"stop": "a" * 1025}, "sampling_params.stop"),
        ({"stop_token_ids": [1] * 1025}, "sampling_params.stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "sampling_params.logit_bias"),
        ({"temperature": 1e39}, "sampling_params.temperature"),
        ({"top_k": 2**31}, "sampling_params.top_k"),
        ({"min_new_tokens": 2**31}, "sampling_params.min_new_tokens"),
        ({"top_p": 1e-46}, "top_p"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"),
    ],
)  # fmt: skip
def test_lists_and_numbers_have_limits(sampling: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [1], "sampling_params": sampling}
            await refused(server, "/generate", body, field)

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"text": "a" * 200_000}, "text"),
        ("/generate", {"text": ["a", "a" * 200_000]}, "[1].text"),
        ("/generate", {"text": "\x00" * 40_000}, "text"),
        ("/generate", {"input_ids": [1] * 2000}, "input_ids"),
        ("/v1/completions", {"prompt": "a" * 200_000}, "prompt"),
        ("/v1/completions", {"prompt": "a" * 200_000, "add_special_tokens": False}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 2000}, "prompt"),
        (CHAT_PATH, {"messages": [{"role": "user", "content": "a" * 200_000}]}, "messages"),
    ],
)
def test_text_that_no_context_holds_is_refused_before_it_is_encoded(
    path: str, body: Any, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()

    def encode(text: str, **_: Any) -> list[int]:
        raise AssertionError(f"{len(text)} characters were encoded")

    async def test() -> None:
        async with serving(tokenizer=tokenizer) as server:
            reply = await server.post(path, body)
            error = reply.json()["error"]
            assert (reply.status_code, error["type"]) == (400, "ContextTooLong"), error
            assert error["field"] == field

    if field != "[1].text":
        monkeypatch.setattr(tokenizer, "encode", encode)
    run(test)


def test_a_body_far_beyond_the_context_is_refused_before_it_is_decoded() -> None:
    async def test() -> None:
        async with serving() as server:
            for path, name in (("/generate", "text"), ("/v1/completions", "prompt")):
                # The text is no UTF-8, which only decoding would find.
                body = b'{"%s": "' % name.encode() + b"\xff" * (2 << 20) + b'"}'
                error = (await server.http.post(path, content=body)).json()["error"]
                assert (error["type"], error["field"]) == ("ContextTooLong", name)
            for path in (CHAT_PATH, "/v1/responses"):
                reply = await server.http.post(path, content=b"[" * (2 << 20))
                assert reply.json()["error"]["type"] == "ContextTooLong"
            ids = b'{"tokens": [7,' + b"\xff," * (1 << 20)
            error = (await server.http.post("/detokenize", content=ids)).json()["error"]
            assert (error["type"], error["field"]) == ("ContextTooLong", "tokens")
            # Whatever messages are, the decoder of their type does not see so many bytes of them.
            body = b'{"messages": [1, "%s"]}' % (b"a" * (2 << 20))
            error = (await server.http.post("/v1/embeddings", content=body)).json()["error"]
            assert (error["type"], error["field"]) == ("ContextTooLong", "messages")

    run(test)


def test_likeliest_tokens_by_the_hundred_million_are_refused() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"text": "a", "return_logprob": True, "top_logprobs_num": 300}
            sampling = {"n": 1000, "max_new_tokens": 511}
            await refused(
                server, "/generate", {**body, "sampling_params": sampling}, "top_logprobs_num"
            )

    run(test)


@pytest.mark.parametrize("name", ["add_generation_prompt", "tools", "messages", "documents"])
def test_template_variables_that_collide_are_400(name: str) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {**CHAT, "chat_template_kwargs": {name: []}}
            await refused(server, CHAT_PATH, body, f"chat_template_kwargs.{name}")

    run(test)


def test_template_variables_of_any_name_pass() -> None:
    async def test() -> None:
        async with serving() as server:
            variables = {"self": 1, "source": 2, "max_chars": 0, "variables": {}, "x-y": None}
            reply = await server.post(CHAT_PATH, {**CHAT, "chat_template_kwargs": variables})
            assert reply.status_code == 200, reply.text

    run(test)


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ("{{ 1 / 0 }}", "messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "messages"),
        ("{{ ''.__class__ }}", "messages"),
        ("{{ nothing.at_all }}", "messages"),
        ("{{ 'a' * 10 ** 10 }}", "messages"),
        ("{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}", "messages"),
        ("{{ raise_exception('no') }}", "messages"),
        ("{{ '\\ud800' }}", "messages"),
        ("{% if %}", "chat_template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat_template"),
        ("a" * 300_000, "chat_template"),
    ],
)
def test_whatever_a_template_does_is_400_of_its_request(template: str, field: str) -> None:
    async def test() -> None:
        async with serving(trust_request_chat_template=True) as server:
            await refused(server, CHAT_PATH, {**CHAT, "chat_template": template}, field)

    run(test)


def test_a_template_of_a_request_needs_the_operators_word() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {**CHAT, "chat_template": "{{ messages[0].content }}"}
            message = await refused(server, CHAT_PATH, body, "chat_template")
            assert "--trust-request-chat-template" in message
            own = {**CHAT, "chat_template": tiny_tokenizer().chat_template}
            assert (await server.post(CHAT_PATH, own)).status_code == 200

    run(test)


@pytest.mark.slow
def test_an_endless_template_holds_up_nobody_and_is_stopped() -> None:
    async def test() -> None:
        async with serving(trust_request_chat_template=True) as server:
            endless = asyncio.create_task(
                server.post(CHAT_PATH, {**CHAT, "chat_template": ENDLESS})
            )
            served = 0
            while not endless.done():
                assert (await server.get("/health")).status_code == 200
                assert (await server.post(CHAT_PATH, CHAT)).status_code == 200
                served += 1
                await asyncio.sleep(0.01)
            error = (await endless).json()["error"]
            assert (error["code"], error["field"]) == (400, "messages")
            assert served >= 3
            brief = {**CHAT, "chat_template": "{{ messages[0].content }}"}
            assert (await server.post(CHAT_PATH, brief)).status_code == 200

    run(test)


def test_a_long_conversation_is_rendered_beside_the_loop() -> None:
    async def test() -> None:
        async with serving() as server:
            messages = [{"role": "user", "content": ""}] * 20_000
            call = asyncio.create_task(server.post(CHAT_PATH, {"messages": messages}))
            ticks = 0
            while not call.done():
                await asyncio.sleep(0.001)
                ticks += 1
            error = (await call).json()["error"]
            assert (error["code"], error["type"]) == (400, "ContextTooLong"), error
            assert ticks > 5

    run(test)


def test_the_event_loop_goes_on_while_long_texts_are_encoded() -> None:
    """65,000 characters a text, 16 texts: a second of work on the loop."""

    async def test() -> None:
        config = replace(fake_config(num_pages=40_000), context_length=70_000)
        async with serving(engine=config) as server:
            text = "The cat sat on the mat, did it not? " * 1800
            body = {"text": [text] * 16, "sampling_params": {"max_new_tokens": 0}}
            call = asyncio.create_task(server.post("/generate", body))
            ticks = 0
            while not call.done():
                await asyncio.sleep(0.001)
                ticks += 1
            assert (await call).status_code == 400
            assert ticks > 20

    run(test)


def test_bodies_nested_deeply_are_400() -> None:
    async def test() -> None:
        async with serving() as server:
            for depth in (150, 5000):
                nested = "[" * depth + "]" * depth
                body = f'{{"messages": [{{"role": "user", "content": "a", "x": {nested}}}]}}'
                reply = await server.http.post(CHAT_PATH, content=body.encode())
                assert reply.status_code == 400, reply.text
            assert server.link.requests == []

    run(test)


def test_base64_that_is_no_ascii_is_400() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"serialized_named_tensors": ["é"]}
            await refused(
                server, "/update_weights_from_tensor", body, "serialized_named_tensors[0]"
            )
            info = {"world_size": 2, "nccl_unique_id_b64": "é"}
            reply = await server.post("/init_weight_transfer_engine", {"init_info": info})
            assert reply.status_code == 400

    run(test)


@pytest.mark.parametrize("label", ["9" * 26, "9" * 5000, str(2**63)])
def test_a_label_that_no_version_holds_is_a_name(label: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/update_weight_version", {"new_version": label})
            if len(label) > 256:
                assert reply.status_code == 400
                return
            assert reply.status_code == 200
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
            found = (await server.post("/generate", body)).json()
            assert found["output_ids"] == expected_tokens([1], 1)
            assert found["meta_info"]["weight_version"] == label

    run(test)


def test_an_error_of_our_own_says_that_it_closes_the_connection() -> None:
    async def test() -> None:
        async with serving() as server:

            def broken(_: object) -> None:
                raise AssertionError("broken")

            server.engine.submit = broken  # type: ignore[assignment]
            transport = httpx.ASGITransport(app=server.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                reply = await http.post("/generate", content=json.dumps({"input_ids": [1]}))
            assert (reply.status_code, reply.headers["connection"]) == (500, "close")

    run(test)


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    async def test() -> None:
        async with serving() as server:
            for path, body in (
                ("/generate", {"input_ids": [1], "kv_policy": "x " * 100_000}),
                ("/pause_generation", {"mode": "y" * 200_000}),
                ("/v1/completions", {"prompt": [1], "stop": {"q" * 100_000: 1}}),
            ):
                reply = await server.post(path, body)
                assert reply.status_code == 400
                assert len(reply.content) < 20_000, path

    run(test)


@pytest.mark.parametrize("field", ["rid", "hold_at", "sampling_params", "token_ids_logprob"])
def test_values_for_more_items_than_there_are_cost_nothing(field: str) -> None:
    values = b",".join([b"{}"] * 100_000)
    body = b'{"text": ["a", "b"], "%s": [%s]}' % (field.encode(), values)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="2 entries") as caught:
            parse_call(body)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()
    assert caught.value.field == field
