"""No stop condition ends a sequence before its minimum: a real engine, both dialects, whole and
streamed, several samples, running out of pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from rollout.offline import run_file
from rollout.ranks.ranked_executor import build_executor
from rollout.replica.inline import InlineReplica
from tests.helpers.http_app import Server, run, serving
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import EOS_ID, IM_END_ID, tiny_tokenizer

pytestmark = pytest.mark.slow

MIN, MAX = 9, 24
NUM_PRINTABLE = 94
STOPS = [chr(33 + token) for token in range(NUM_PRINTABLE)]
"""As texts the tokens below NUM_PRINTABLE, each of which completes one."""
STOP_IDS = list(range(0, 300, 2))
PROMPT = [5, 6, 7, 8, 9]
ROUTES = ["native", "completions", "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_tiny(made, vocab_size=300, bos_token_id=256, eos_token_id=EOS_ID)
    return made


@pytest.fixture
def config(folder: Path) -> Iterator[EngineConfig]:
    yield engine_config(folder)


def engine_config(folder: Path, num_pages: int = 400) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=num_pages, page_size=4),
        scheduler=SchedulerConfig(max_running=16, max_step_tokens=64, check_integrity=True),
    )


def native_body(n: int, options: dict[str, Any]) -> dict[str, Any]:
    names = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"}
    sampling = {names.get(name, name): value for name, value in options.items()}
    return {"input_ids": PROMPT, "sampling_params": {**sampling, "max_new_tokens": MAX, "n": n}}


async def call(
    server: Server, route: str, n: int, stream: bool, **options: Any
) -> list[tuple[list[int], Any]]:
    """Tokens of every sample, and why it ended."""
    if route == "native":
        body, path = native_body(n, options), "/generate"
    else:
        body = {**options, "n": n, "max_tokens": MAX, "return_token_ids": True}
        path = "/v1/completions" if route == "completions" else "/v1/chat/completions"
        prompt = {"prompt": PROMPT} if route == "completions" else {}
        body |= prompt or {"messages": [{"role": "user", "content": "ab"}]}
    reply = await server.post(path, {**body, "stream": stream})
    assert reply.status_code == 200, reply.text
    if not stream:
        found = reply.json()
        if route != "native":
            return [(c["token_ids"], c["finish_reason"]) for c in found["choices"]]
        samples = found if n > 1 else [found]
        return [(s["output_ids"], s["meta_info"]["finish_reason"]["type"]) for s in samples]
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    samples = {index: ([], None) for index in range(n)}
    for frame in map(json.loads, lines[:-1]):
        if route == "native":
            reason = frame["meta_info"]["finish_reason"]
            samples[frame.get("index", 0)] = (frame["output_ids"], reason and reason["type"])
            continue
        for choice in frame["choices"]:
            ids, _ = samples[choice["index"]]
            ids = [*ids, *choice.get("token_ids", [])]
            samples[choice["index"]] = (ids, choice["finish_reason"])
    return [samples[index] for index in range(n)]


def cut(ids: list[int]) -> tuple[list[int], str]:
    """`ids` up to the first token beyond the minimum that completes a stop string."""
    for size in range(MIN + 1, len(ids) + 1):
        if ids[size - 1] < NUM_PRINTABLE:
            return ids[:size], "stop"
    return ids, "length"


def stopped_by_id(ids: list[int]) -> tuple[list[int], str]:
    """What may have come out if tokens of STOP_IDS end the sequence: all of `ids`, or the test
    fails."""
    assert not set(ids[:MIN]) & set(STOP_IDS)
    early = [token for token in ids[MIN:-1] if token in STOP_IDS]
    assert early == []
    return ids, "stop" if ids[-1] in STOP_IDS else "length"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_stop_strings_and_ids(route: str, stream: bool, n: int, config: EngineConfig) -> None:
    async def test() -> None:
        async with serving(engine=config, executor=build_executor) as server:
            plain = await call(server, route, n, False, seed=3, ignore_eos=True)
            assert any(min(ids[:MIN]) < NUM_PRINTABLE for ids, _ in plain), "nothing to ignore"
            limits = {"seed": 3, "ignore_eos": True, "min_tokens": MIN}
            found = await call(server, route, n, stream, stop=STOPS, **limits)
            assert found == [cut(ids) for ids, _ in plain]
            assert "stop" in [reason for _, reason in found]
            by_id = await call(server, route, n, stream, stop_token_ids=STOP_IDS, **limits)
            assert by_id == [stopped_by_id(ids) for ids, _ in by_id]
            # Written as a text, a special token is a stop token; EOS is one unless ignored.
            bias = {str(token): 30.0 for token in (EOS_ID, IM_END_ID)}
            more = {"logit_bias": bias, "stop": ["<|im_end|>"], "min_tokens": MIN, "seed": 3}
            for ids, reason in await call(server, route, n, stream, **more):
                assert (len(ids), reason) == (MIN + 1, "stop")

    run(test)


def test_after_retractions(folder: Path) -> None:
    async def test() -> None:
        limits = {"seed": 3, "ignore_eos": True, "min_tokens": MIN}
        async with serving(engine=engine_config(folder), executor=build_executor) as server:
            plain = await call(server, "native", 8, False, seed=3, ignore_eos=True)
            by_id = await call(server, "native", 8, False, stop_token_ids=STOP_IDS, **limits)
        small = engine_config(folder, num_pages=14)
        async with serving(engine=small, executor=build_executor) as server:
            server.link.leader._scheduler._reserve._ratio = 0.0
            body = native_body(8, {**limits, "stop": STOPS})
            replies = (await server.post("/generate", body)).json()
            assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 0
            assert [reply["output_ids"] for reply in replies] == [cut(ids)[0] for ids, _ in plain]
            server.link.leader._scheduler._reserve._ratio = 0.0
            body = native_body(8, {**limits, "stop_token_ids": STOP_IDS})
            replies = (await server.post("/generate", body)).json()
            assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 0
            assert [reply["output_ids"] for reply in replies] == [ids for ids, _ in by_id]

    run(test)


def test_in_a_file_of_requests(config: EngineConfig, tmp_path: Path) -> None:
    limits = {"seed": 3, "ignore_eos": True}
    lines = [native_body(3, limits), native_body(3, {**limits, "min_tokens": MIN, "stop": STOPS})]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with InlineReplica(config, build_executor(config)) as replica:
        run_file(replica, tiny_tokenizer(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    plain, found = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    tokenizer = tiny_tokenizer()
    for whole, reply in zip(plain, found, strict=True):
        ids, reason = cut(whole["output_ids"])
        assert reply["output_ids"] == ids
        assert reply["meta_info"]["finish_reason"]["type"] == reason == "stop"
        assert reply["text"] == tokenizer.decode(ids)[:-1]
