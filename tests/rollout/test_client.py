"""The client's bodies and errors, against canned replies; the server's tests use it for real."""

import json
from collections.abc import Callable

import httpx
import pytest

from engine.errors import EngineDead, InvalidRequest, SlipstreamError, UpdateOrder
from engine.protocol import (
    BeginUpdate,
    GenerateRequest,
    ReceiveIpc,
    SamplingParams,
    TensorSpec,
)
from rollout.client import Client

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, **options: str) -> Client:
    return Client("http://server", transport=httpx.MockTransport(handler), **options)


def error(status: int, kind: str) -> Handler:
    body = {"error": {"type": kind, "message": "why", "field": "f", "code": status}}
    return lambda _: httpx.Response(status, json=body)


def test_a_batch_becomes_lists_of_the_fields_that_are_set() -> None:
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=[{"output_ids": [1]}, {"output_ids": [2]}])

    pair = [
        GenerateRequest(input_ids=[1], sampling_params=SamplingParams(top_k=2)),
        GenerateRequest(input_ids=[2], return_logprob=True),
    ]
    with client(handler) as found:
        assert [reply.output_ids for reply in found.generate(pair)] == [[1], [2]]
    assert bodies == [
        {
            "input_ids": [[1], [2]],
            "sampling_params": [{"top_k": 2}, {}],
            "return_logprob": [False, True],
        }
    ]


@pytest.mark.parametrize(
    "batch,field",
    [
        ([], "requests"),
        ([GenerateRequest(text="a"), GenerateRequest(input_ids=[1])], "text, input_ids"),
        ([GenerateRequest(text="a", stream=True)], "stream"),
    ],
)
def test_a_batch_that_has_no_body(batch: list[GenerateRequest], field: str) -> None:
    with client(error(500, "X")) as found, pytest.raises(InvalidRequest) as caught:
        found.generate(batch)
    assert caught.value.field == field


def test_commands_go_as_tagged_json_under_the_admin_key() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.headers.get("authorization"), request.content))
        return httpx.Response(200, json={"type": "reply"})

    begin = BeginUpdate(version=3, manifest=[TensorSpec("w", "float32", [2])])
    with client(handler, api_key="k", admin_api_key="a") as found:
        found.send(begin)
        found.send(ReceiveIpc(payloads=[b"\x00\xff"]))
    (path, key, first), (_, _, second) = seen
    assert (path, key) == ("/command", "Bearer a")
    assert json.loads(first)["type"] == "begin_update"
    assert json.loads(second)["payloads"] == ["AP8="]


@pytest.mark.parametrize(
    "handler,kind",
    [(error(409, "UpdateOrder"), UpdateOrder), (error(503, "EngineDead"), EngineDead)],
)
def test_errors_come_back_typed(handler: Handler, kind: type[SlipstreamError]) -> None:
    with client(handler) as found:
        for call in (
            lambda: found.state(),
            lambda: found.generate(GenerateRequest(text="a")),
            lambda: next(found.stream(GenerateRequest(text="a"))),
        ):
            with pytest.raises(kind, match="why") as caught:
                call()
            assert caught.value.field == "f"


def test_a_reply_that_is_not_ours() -> None:
    bad = httpx.Response(502, text="bad gateway")
    with client(lambda _: bad) as found, pytest.raises(SlipstreamError, match="502: bad gateway"):
        found.state()


def test_a_server_that_is_not_there() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client(handler) as found:
        for call in (found.state, lambda: found.wait_ready(0.0)):
            with pytest.raises(EngineDead, match="http://server: refused"):
                call()


@pytest.mark.parametrize("url", ["localhost:30000", "http://[::1", "http://a:b", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no URL") as caught:
        Client(url)
    assert caught.value.field == "url"


def test_a_stream_ends_at_done_and_raises_its_errors() -> None:
    lines = 'data: {"output_ids":[1]}\n\ndata: {"output_ids":[1,2]}\n\n'
    failed = 'data: {"error":{"type":"EngineDead","message":"why","field":"leader","code":503}}\n\n'
    texts = iter([lines + "data: [DONE]\n\n", lines + failed])

    with client(lambda _: httpx.Response(200, text=next(texts))) as found:
        request = GenerateRequest(input_ids=[0])
        assert [reply.output_ids for reply in found.stream(request)] == [[1], [1, 2]]
        stream = found.stream(request)
        assert [next(stream).output_ids for _ in range(2)] == [[1], [1, 2]]
        with pytest.raises(EngineDead, match="why"):
            next(stream)


def test_a_key_of_any_letters_reaches_the_server() -> None:
    seen: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.extend(value for name, value in request.headers.raw if name == b"authorization")
        return httpx.Response(200, json={"output_ids": [1]})

    with client(handler, api_key="kéy") as found:
        found.generate(GenerateRequest(input_ids=[1]))
    assert seen == ["Bearer kéy".encode()]
