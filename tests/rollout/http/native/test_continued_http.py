"""Requests that are held and continued, over HTTP: each part on a server of its own."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import GenerateRequest, GenerateResponse, Request, SamplingParams
from rollout.client import Client
from rollout.http.native.generate_call import PromptRoom, parse_call
from rollout.http.native.text_workers import TextWorkers
from rollout.offline import run_file
from rollout.ranks.ranked_executor import build_executor
from rollout.requests import respond
from rollout.requests.expand import expand
from rollout.requests.parts import continued, joined, unfinished
from tests.helpers.fake_executor import EOS_ID, expected_tokens
from tests.helpers.http_app import Server, run, serving
from tests.helpers.near_edges import on_an_edge
from tests.helpers.replicas import fake_config, inline
from tests.helpers.samplers import SAMPLERS
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPT = [5, 6, 7]
IDS = expected_tokens(PROMPT, 12)
TEXT = tiny_tokenizer().decode(IDS)
SAMPLING = {"max_new_tokens": 12}


def new_server(**options: Any) -> Client:
    """A client whose every call is answered by a server that was not there before."""

    def handle(request: httpx.Request) -> httpx.Response:
        return asyncio.run(answer(request))

    async def answer(request: httpx.Request) -> httpx.Response:
        async with serving(**options) as server:
            reply = await server.http.request(
                request.method,
                request.url.path,
                content=request.content,
                headers={"content-type": "application/json"},
            )
            kind = {"content-type": reply.headers["content-type"]}
            return httpx.Response(reply.status_code, content=reply.content, headers=kind)

    return Client("http://127.0.0.1", transport=httpx.MockTransport(handle))


def plain(replies: list[GenerateResponse]) -> list[GenerateResponse]:
    """Without what depends on what a server did before."""
    replies = copy.deepcopy(replies)
    for reply in replies:
        for name in ("id", "cached_tokens", "kv_versions"):
            reply.meta_info.pop(name, None)
    return replies


@pytest.mark.parametrize("n", [1, 3])
def test_the_client_holds_and_goes_on(n: int) -> None:
    client = new_server()
    sampling = SamplingParams(max_new_tokens=12, n=n, stop=TEXT[8:10], sampling_seed=1)
    wire = GenerateRequest(input_ids=PROMPT, sampling_params=sampling, rid="r", return_logprob=True)
    whole = client.generate(wire)
    assert whole[0].text == TEXT[:8]
    held = GenerateRequest(
        input_ids=PROMPT, sampling_params=sampling, rid="r", return_logprob=True, hold_at=4
    )
    parts = [client.generate(held)]
    while unfinished(parts[-1]):
        held = continued(held, parts[-1], hold_at=4 * len(parts) + 5)
        parts.append(client.generate(held))
    assert len(parts) == 3
    assert [reply.output_ids for reply in parts[1]] == [IDS[4:9]] * n
    assert plain(joined(parts)) == plain(whole)


def test_the_client_sends_batches() -> None:
    other = expected_tokens([9], 12)
    sampling = SamplingParams(**SAMPLING)
    found = new_server().generate(
        [
            GenerateRequest(input_ids=PROMPT, output_ids=IDS[:7], sampling_params=sampling),
            GenerateRequest(input_ids=[9], hold_at=3, sampling_params=sampling),
        ]
    )
    assert [reply.output_ids for reply in found] == [IDS[7:], other[:3]]
    sampling = SamplingParams(**SAMPLING, n=2)
    found = new_server().generate(
        [
            GenerateRequest(input_ids=PROMPT, output_ids=[IDS[:7], []], sampling_params=sampling),
            GenerateRequest(input_ids=[9], sampling_params=sampling),
        ]
    )
    assert [reply.output_ids for reply in found] == [IDS[7:], IDS, other, other]


def test_streams_go_on() -> None:
    for incremental in (False, True):
        client = new_server(incremental_streaming_output=incremental)
        wire = GenerateRequest(
            input_ids=PROMPT,
            output_ids=IDS[:5],
            sampling_params=SamplingParams(**SAMPLING),
            hold_at=9,
        )
        frames = list(client.stream(wire))
        ids = [i for frame in frames for i in frame.output_ids]
        assert (ids if incremental else frames[-1].output_ids) == IDS[5:9]
        text = "".join(frame.text for frame in frames) if incremental else frames[-1].text
        assert text == TEXT[5:9]
        meta = frames[-1].meta_info
        assert meta["finish_reason"] == {"type": "hold", "length": 9}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, 9)
        assert (meta["output_start"], meta["text_start"]) == (5, 5)
        assert meta["weight_versions"] == [{"version": "0", "start": 5, "end": 9}]
        assert [frame.meta_info["completion_tokens"] for frame in frames] == [6, 7, 8, 9]


def post(body: dict[str, Any], **options: Any) -> Any:
    async def one(server: Server) -> Any:
        return await server.post("/generate", body)

    found = []

    async def test() -> None:
        async with serving(**options) as server:
            found.append(await one(server))

    run(test)
    return found[0]


def test_a_batch_has_a_list_a_prompt() -> None:
    other = expected_tokens([9], 12)
    body = {
        "input_ids": [PROMPT, [9], [9]],
        "output_ids": [IDS[:3], None, other[:11]],
        "hold_at": [7, 2, -1],
        "sampling_params": SAMPLING,
    }
    found = post(body).json()
    assert [reply["output_ids"] for reply in found] == [IDS[3:7], other[:2], other[11:]]
    starts = [reply["meta_info"].get("output_start") for reply in found]
    assert starts == [3, None, 11]
    with_samples = {**body, "sampling_params": {**SAMPLING, "n": 2}}
    with_samples["output_ids"] = [[IDS[:3], IDS[:4]], [[], other[:1]], None]
    found = post(with_samples).json()
    wanted = [IDS[3:7], IDS[4:7], other[:2], other[1:2], other, other]
    assert [reply["output_ids"] for reply in found] == wanted
    shared = {**body, "output_ids": None, "hold_at": 2}
    assert [r["output_ids"] for r in post(shared).json()] == [IDS[:2], other[:2], other[:2]]


def test_what_was_over_is_answered_at_once_and_with_the_prompt_scored() -> None:
    stop = {"max_new_tokens": 12, "stop": TEXT[4:6]}
    eos = {"max_new_tokens": 12}
    for sampling, ids, size, reason in (
        (stop, IDS[:9], 6, {"type": "stop", "matched": TEXT[4:6]}),
        (stop, IDS[:6], 6, {"type": "stop", "matched": TEXT[4:6]}),
        (eos, [*IDS[:2], EOS_ID], 3, {"type": "stop", "matched": EOS_ID}),
        (eos, [*IDS[:2], EOS_ID, 4, 4], 3, {"type": "stop", "matched": EOS_ID}),
        (eos, IDS, 12, {"type": "length", "length": 12}),
    ):
        body = {"input_ids": PROMPT, "sampling_params": sampling, "output_ids": ids}
        for scored in (False, True):
            more = {"return_logprob": True, "logprob_start_len": 0} if scored else {}
            found = post({**body, **more}).json()
            meta = found["meta_info"]
            stream = post({**body, **more, "stream": True}).text.split("\n\n")
            frame = json.loads(stream[0].removeprefix("data: "))
            assert stream[1:] == ["data: [DONE]", ""]
            assert {**frame["meta_info"], "id": meta["id"]} == meta
            assert (found["output_ids"], found["text"]) == ([], "")
            assert meta["finish_reason"] == reason
            assert (meta["completion_tokens"], meta["output_start"]) == (size, size)
            assert ("input_token_logprobs" in meta) == scored
            if scored:
                assert len(meta["input_token_logprobs"]) == 3
                assert meta["output_token_logprobs"] == []


def test_a_model_without_a_tokenizer_goes_on_in_ids() -> None:
    body = {"input_ids": PROMPT, "output_ids": IDS[:5], "sampling_params": SAMPLING}
    found = post(body, ids_only=True).json()
    assert found["output_ids"] == IDS[5:] and "text" not in found
    assert (found["meta_info"]["output_start"], found["meta_info"]["text_start"]) == (5, None)


def test_many_output_tokens_become_text_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[str] = []
    run_beside = TextWorkers.run

    async def noted(self: TextWorkers, work: Any, *args: Any, **options: Any) -> Any:
        beside.append(work.__name__)
        return await run_beside(self, work, *args, **options)

    monkeypatch.setattr(TextWorkers, "run", noted)
    engine = dataclasses.replace(fake_config(num_pages=4000), context_length=12_000)
    sampling = {"max_new_tokens": 10_000, "stop": "no such"}
    for count, found in ((9000, ["_expand", "_whole"]), (100, [])):
        body = {"input_ids": PROMPT, "output_ids": [1] * count, "hold_at": count + 2}
        assert len(post({**body, "sampling_params": sampling}, engine=engine).json()) == 3
        assert beside == found
        beside.clear()


def test_an_increment_makes_its_own_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of all tokens before it, for each of them."""
    asked: list[str] = []
    text_of = respond.text_of

    def noted(request: Request, *args: Any) -> str:
        asked.append(request.rid)
        return text_of(request, *args)

    monkeypatch.setattr(respond, "text_of", noted)
    body = {"input_ids": PROMPT, "output_ids": IDS[:4], "sampling_params": SAMPLING, "stream": True}
    body |= {"return_logprob": True, "return_text_in_logprobs": True}
    frames = post(body, incremental_streaming_output=True).text.split("\n\n")[:-2]
    found = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert "".join(frame["text"] for frame in found) == TEXT[4:]
    texts = [entry[2] for frame in found for entry in frame["meta_info"]["output_token_logprobs"]]
    assert "".join(texts) == TEXT[4:]
    assert len(asked) == 1 < len(found)


def test_more_lists_than_samples_are_refused_before_each_is_an_object() -> None:
    body = b'{"input_ids": [1], "output_ids": [%b[]]}' % (b"[]," * 100_000)
    room = PromptRoom(text_bytes=100, num_ids=100, num_items=50)
    with pytest.raises(InvalidRequest, match="100002 lists") as caught:
        parse_call(body, room)
    assert caught.value.field == "output_ids"
    most = json.dumps({"input_ids": [[1]] * 50, "output_ids": [[[]]] * 50})
    assert len(parse_call(most.encode(), room).items) == 50


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"output_ids": [300]}, "output_ids", "InvalidRequest"),
    ({"output_ids": [-1]}, "output_ids", "InvalidRequest"),
    ({"output_ids": [2**31]}, "output_ids[0]", "InvalidRequest"),
    ({"output_ids": ["a"]}, "output_ids[0]", "InvalidRequest"),
    ({"output_ids": [1.5]}, "output_ids[0]", "InvalidRequest"),
    ({"output_ids": [True]}, "output_ids[0]", "InvalidRequest"),
    ({"output_ids": "abc"}, "output_ids", "InvalidRequest"),
    ({"output_ids": {"a": 1}}, "output_ids", "InvalidRequest"),
    ({"output_ids": [1] * 13}, "output_ids", "InvalidRequest"),
    ({"output_ids": [1] * 600}, "output_ids", "ContextTooLong"),
    ({"output_ids": [1] * 200_000}, "output_ids", "ContextTooLong"),
    ({"output_ids": [1] * 511, "sampling_params": {"max_new_tokens": 600}}, "output_ids", "C"),
    ({"output_ids": [[1], [2]]}, "output_ids", "InvalidRequest"),
    ({"output_ids": [[1], 2]}, "output_ids", "InvalidRequest"),
    ({"output_ids": [[[1]]]}, "output_ids[0][0]", "InvalidRequest"),
    ({"output_ids": [1], "sampling_params": {"n": 2}}, "output_ids", "InvalidRequest"),
    ({"output_ids": [[1]], "sampling_params": {"n": 2}}, "output_ids", "InvalidRequest"),
    ({"output_ids": [[1], [300]], "sampling_params": {"n": 2}}, "output_ids", "InvalidRequest"),
    (
        {"output_ids": [[1], [2, 3]], "hold_at": 2, "sampling_params": {"n": 2}},
        "hold_at",
        "InvalidRequest",
    ),
    ({"output_ids": [1, 2], "hold_at": 2}, "hold_at", "InvalidRequest"),
    ({"hold_at": 0}, "hold_at", "InvalidRequest"),
    ({"hold_at": -5}, "hold_at", "InvalidRequest"),
    ({"hold_at": 2**31}, "hold_at", "InvalidRequest"),
    ({"hold_at": 1.5}, "hold_at", "InvalidRequest"),
    ({"hold_at": "7"}, "hold_at", "InvalidRequest"),
    ({"input_ids": [[1], [2]], "output_ids": [1, 2]}, "[0].output_ids", "InvalidRequest"),
    ({"input_ids": [[1], [2]], "output_ids": [[1]]}, "output_ids", "InvalidRequest"),
    ({"input_ids": [[1], [2]], "output_ids": [[1], [300]]}, "[1].output_ids", "InvalidRequest"),
    ({"input_ids": [[1], [2]], "hold_at": [3, 0]}, "[1].hold_at", "InvalidRequest"),
    ({"sampling_params": {"output_ids": [1]}}, "sampling_params.output_ids", "InvalidRequest"),
    ({"sampling_params": {"hold_at": 1}}, "sampling_params.hold_at", "InvalidRequest"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "field", "kind"), BAD)
def test_bad_fields_are_named(fields: dict[str, Any], field: str, kind: str, stream: bool) -> None:
    fields = {**fields, "sampling_params": {**SAMPLING, **fields.get("sampling_params", {})}}
    reply = post({"input_ids": PROMPT, "stream": stream, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["field"]) == (400, field), error
    assert error["type"].startswith(kind)
    assert field.rpartition(".")[2] in error["message"]


def test_nulls_and_empty_lists_ask_for_nothing() -> None:
    body = {"input_ids": PROMPT, "sampling_params": SAMPLING}
    for fields in ({"output_ids": None, "hold_at": None}, {"output_ids": []}, {"hold_at": -1}):
        found = post({**body, **fields}).json()
        assert found["output_ids"] == IDS
        assert "output_start" not in found["meta_info"]


def test_the_client_raises_what_the_server_says() -> None:
    client = new_server()
    with pytest.raises(ContextTooLong) as raised:
        client.generate(GenerateRequest(input_ids=PROMPT, output_ids=[1] * 600))
    assert raised.value.field == "output_ids"
    with pytest.raises(InvalidRequest):
        client.generate(GenerateRequest(input_ids=PROMPT, hold_at=0))


def test_a_call_that_is_held_back_goes_on_too() -> None:
    """While a pause is on its way, requests wait in the server."""

    async def test() -> None:
        async with serving() as server:
            server.engine.outbox.hold()
            body = {
                "input_ids": PROMPT,
                "output_ids": IDS[:9],
                "sampling_params": {"max_new_tokens": 12, "stop": TEXT[4:6]},
            }
            call = asyncio.ensure_future(server.post("/generate", body))
            while not server.engine.outbox:
                await asyncio.sleep(0)
            server.engine.outbox.release()
            found = (await call).json()
            assert found["meta_info"]["finish_reason"]["matched"] == TEXT[4:6]

    run(test)


def test_a_file_of_requests_is_held_and_continued(tmp_path: Path) -> None:
    sampling = {"max_new_tokens": 12, "n": 2, "stop": TEXT[8:10]}
    base = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True, "rid": "a"}
    lines = [base, {**base, "hold_at": 5, "rid": "b"}, {**base, "hold_at": 0, "rid": "c"}]
    whole, held, bad = answer_file(tmp_path, lines)
    assert bad["error"]["field"] == "hold_at"
    seeds = {reply["meta_info"]["sampling_seed"] for reply in held}
    assert len(seeds) == 1
    wire = msgspec.convert(base, GenerateRequest)
    parts = [msgspec.convert(held, list[GenerateResponse])]
    rest = continued(wire, parts[0])
    assert rest.sampling_params.sampling_seed in seeds
    (line,) = answer_file(tmp_path, [msgspec.to_builtins(rest)])
    parts.append(msgspec.convert(line, list[GenerateResponse]))
    assert plain(joined(parts)) == plain(msgspec.convert(whole, list[GenerateResponse]))


def answer_file(folder: Path, lines: list[Any]) -> list[Any]:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with inline() as replica:
        run_file(replica, tiny_tokenizer(), folder / "in.jsonl", folder / "out.jsonl")
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


SIZE = 20
ROWS = ("output_token_logprobs", "output_token_entropy")


class Servers:
    """Two servers of one small checkpoint, each with an engine of its own, and its model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tiny(folder, vocab_size=300, bos_token_id=256, eos_token_id=EOS_ID)
        self.num_tokens = self.num_excused = 0

    def config(self, page_size: int) -> EngineConfig:
        return EngineConfig(
            model=str(self.folder),
            dtype="float32",
            device="cpu",
            cache=CacheConfig(num_pages=1600 // page_size, page_size=page_size),
            scheduler=SchedulerConfig(max_running=16, max_step_tokens=64, check_integrity=True),
        )

    async def check(
        self, one: Server, other: Server, sampler: str, n: int, cuts: list[int], stream: bool
    ) -> None:
        sampling = SamplingParams(
            **{"max_new_tokens": SIZE, "n": n, "sampling_seed": 11, **SAMPLERS[sampler]}
        )
        wire = GenerateRequest(
            input_ids=[*range(30, 50)],
            sampling_params=sampling,
            return_logprob=True,
            return_entropy=True,
        )
        whole = await ask(one, wire, stream)
        assert len({tuple(reply.output_ids) for reply in whole}) == (
            1 if sampling.temperature == 0 else n
        )
        for hold_at in cuts:
            held = msgspec.structs.replace(wire, hold_at=hold_at)
            first = await ask(one, held, stream)
            rest = await ask(other, continued(wire, first), stream)
            found = joined([first, rest])
            for number, (got, want) in enumerate(zip(found, whole, strict=True)):
                self.compare(wire, number, got, want)

    def compare(
        self, wire: GenerateRequest, number: int, got: GenerateResponse, want: GenerateResponse
    ) -> None:
        self.num_tokens += len(want.output_ids)
        if got.output_ids != want.output_ids:
            pairs = zip(got.output_ids, want.output_ids, strict=False)
            first = next(at for at, (a, b) in enumerate(pairs) if a != b)
            with inline() as replica:
                request = expand(wire, None, replica.state(), 0)[number]
            assert on_an_edge(self.model, request, want.output_ids[:first])
            self.num_excused += 1
            return
        got, want = plain([got, want])
        for name in ROWS:
            rows = (np.array(reply.meta_info.pop(name), np.float64) for reply in (got, want))
            np.testing.assert_allclose(*rows, atol=1e-4)
        assert got == want


async def ask(server: Server, wire: GenerateRequest, stream: bool) -> list[GenerateResponse]:
    body = msgspec.json.encode(msgspec.structs.replace(wire, stream=stream))
    headers = {"content-type": "application/json"}
    reply = await server.http.post("/generate", content=body, headers=headers)
    assert reply.status_code == 200, reply.text
    if not stream:
        found = reply.json()
        return msgspec.convert(
            found if isinstance(found, list) else [found], list[GenerateResponse]
        )
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    frames = [msgspec.json.decode(line, type=GenerateResponse) for line in lines[:-1]]
    last = {frame.index: frame for frame in frames}
    return [last[index] for index in sorted(last, key=lambda index: index or 0)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Servers:
    return Servers(tmp_path_factory.mktemp("model"))


def check_all(servers: Servers, samplers: list[str], ns: list[int], cuts: list[int]) -> None:
    async def test() -> None:
        options: dict[str, Any] = {"executor": build_executor}
        first, second = servers.config(4), servers.config(8)
        async with (
            serving(engine=first, **options) as one,
            serving(engine=second, **options) as other,
        ):
            for sampler in samplers:
                for n in ns:
                    for stream in (False, True):
                        await servers.check(one, other, sampler, n, cuts, stream)

    asyncio.run(test())
    assert servers.num_tokens > 0
    assert servers.num_excused <= -(-servers.num_tokens // 10_000)


@pytest.mark.slow
def test_from_server_to_server(servers: Servers) -> None:
    check_all(servers, ["greedy_penalised", "all", "top_p"], [2], [1, 9])


@pytest.mark.long
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_server_to_server_with_every_sampler(servers: Servers, sampler: str) -> None:
    check_all(servers, [sampler], [3], list(range(1, SIZE + 1, 2)))
