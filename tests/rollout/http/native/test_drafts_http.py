"""A server that drafts tokens, over a small real model: what it says, counts and refuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from rollout.ranks.ranked_executor import build_executor
from tests.helpers.http_app import Server, run, serving
from tests.helpers.tiny_models import write_tiny

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
GREEDY = {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True}
NGRAM = SpeculativeConfig(method="ngram", draft_tokens=3, history_tokens=1 << 12, num_segments=16)
FORCED = SpeculativeConfig(
    method="ngram", allow_forced_acceptance=True, history_tokens=1 << 12, num_segments=16
)
OFF = SpeculativeConfig()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "llama")
    return folder


@asynccontextmanager
async def drafting(model: Path, speculative: SpeculativeConfig) -> AsyncIterator[Server]:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        cache=CacheConfig(num_pages=256, page_size=8),
        scheduler=SchedulerConfig(max_running=8, check_integrity=True),
        speculative=speculative,
    )
    async with serving(engine=config, executor=build_executor, served_model_name="mine") as server:
        yield server


async def generate(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, **fields}
    reply = await server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def spec_of(meta: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in meta.items() if k.startswith("spec_") or k == "synthetic"}


async def metrics(server: Server) -> dict[str, float]:
    """Samples by name; those of a drafter are by "ngram"."""
    await server.get("/get_weight_version")
    found = {}
    for family in text_string_to_metric_families((await server.get("/metrics")).text):
        for sample in family.samples:
            assert sample.labels.get("drafter", "ngram") == "ngram"
            found[sample.name] = sample.value
    return found


def test_replies_say_what_was_drafted_and_are_those_of_a_server_that_drafts_nothing(
    model: Path,
) -> None:
    async def test() -> None:
        async with drafting(model, OFF) as server:
            plain = await generate(server)
            assert spec_of(plain["meta_info"]) == {}
        async with drafting(model, NGRAM) as server:
            found = await generate(server)
            assert found["output_ids"] == plain["output_ids"]
            spec = spec_of(found["meta_info"])
            drafted, accepted = spec["spec_num_proposed_drafts"], spec["spec_num_correct_drafts"]
            verifies = spec["spec_verify_ct"]
            assert 0 < accepted <= drafted <= 3 * verifies
            assert spec == {
                "spec_verify_ct": verifies,
                "spec_num_proposed_drafts": drafted,
                "spec_num_correct_drafts": accepted,
                "spec_draft_token_num": drafted,
                "spec_accept_token_num": accepted,
                "spec_accept_length": 1 + accepted / verifies,
                "spec_accept_rate": accepted / drafted,
            }

    run(test)


def test_a_stream_says_what_was_drafted_so_far(model: Path) -> None:
    async def test() -> None:
        async with drafting(model, NGRAM) as server:
            body = {"input_ids": PROMPT, "sampling_params": GREEDY, "stream": True}
            lines = (await server.post("/generate", body)).text.split("\n\n")
            frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            whole = spec_of((await generate(server))["meta_info"])
            counts = [spec_of(frame["meta_info"]) for frame in frames]
            assert len(frames) < GREEDY["max_new_tokens"], "no frame has several tokens"
            verifies = [count["spec_verify_ct"] for count in counts]
            assert verifies == sorted(verifies)
            assert verifies[-1] > 0
            assert set(whole) == set(counts[-1])

    run(test)


UNDRAFTED = [
    ({"draft_tokens": 0}, {}, "draft_tokens"),
    ({}, {"frequency_penalty": 0.1}, "frequency_penalty"),
    ({}, {"presence_penalty": 0.1}, "presence_penalty"),
    ({}, {"repetition_penalty": 1.1}, "repetition_penalty"),
    ({}, {"logit_bias": {"3": 0.5}}, "logit_bias"),
    ({}, {"min_new_tokens": 4}, "min_new_tokens"),
    ({"return_logprob": True, "top_logprobs_num": 2}, {}, "top_logprobs_num"),
    ({"return_logprob": True, "token_ids_logprob": [4]}, {}, "token_ids_logprob"),
]


@pytest.mark.parametrize(("fields", "sampling", "reason"), UNDRAFTED)
def test_a_request_that_lets_nothing_be_drafted_says_which_field_does(
    model: Path, fields: dict[str, Any], sampling: dict[str, Any], reason: str
) -> None:
    async def test() -> None:
        params = {**GREEDY, "max_new_tokens": 12, **sampling}
        async with drafting(model, NGRAM) as server:
            meta = (await generate(server, sampling_params=params, **fields))["meta_info"]
            assert (meta["spec_off"], meta["spec_verify_ct"]) == (reason, 0)
            assert "spec_accept_rate" not in meta
            plain = {**GREEDY, "max_new_tokens": 12}
            assert "spec_off" not in (await generate(server, sampling_params=plain))["meta_info"]

    run(test)


def test_forced_acceptance_is_called_synthetic(model: Path) -> None:
    async def test() -> None:
        async with drafting(model, FORCED) as server:
            params = {**GREEDY, "max_new_tokens": 41}
            found = await generate(server, sampling_params=params, forced_acceptance=1.0)
            meta = found["meta_info"]
            assert meta["synthetic"] is True
            assert meta["spec_accept_rate"] == 1
            assert meta["spec_accept_length"] == 4
            assert meta["completion_tokens"] == 41
            assert "synthetic" not in (await generate(server))["meta_info"]

    run(test)


REFUSED = [
    (NGRAM, {"draft_tokens": 4}, "draft_tokens", "give 0 to 3"),
    (NGRAM, {"draft_tokens": -2}, "draft_tokens", "is -2"),
    (NGRAM, {"forced_acceptance": 0.5}, "forced_acceptance", "--allow-forced-acceptance"),
    (OFF, {"draft_tokens": 1}, "draft_tokens", "drafts nothing"),
    (OFF, {"forced_acceptance": 0.5}, "forced_acceptance", "--speculative"),
    (FORCED, {"forced_acceptance": 1.5}, "forced_acceptance", "[0, 1]"),
    (FORCED, {"forced_acceptance": -0.5}, "forced_acceptance", "[0, 1]"),
]


@pytest.mark.parametrize(("speculative", "fields", "field", "says"), REFUSED)
def test_what_the_server_does_not_serve_is_refused_and_nothing_else(
    model: Path, speculative: SpeculativeConfig, fields: dict[str, Any], field: str, says: str
) -> None:
    async def test() -> None:
        async with drafting(model, speculative) as server:
            body = {"input_ids": PROMPT, "sampling_params": GREEDY, **fields}
            reply = await server.post("/generate", body)
            error = reply.json()["error"]
            assert (reply.status_code, error["field"]) == (400, field)
            assert says in error["message"]
            assert len((await generate(server, draft_tokens=0))["output_ids"]) == 48

    run(test)


def test_counters_are_the_sums_of_what_replies_say(model: Path) -> None:
    async def test() -> None:
        async with drafting(model, NGRAM) as server:
            before = await metrics(server)
            assert before["slipstream_drafted_tokens_total"] == 0
            assert "slipstream_accept_length" not in before
            prompts = [PROMPT, [9, 8, 9, 8, 9]]
            body = {"input_ids": prompts, "sampling_params": GREEDY}
            metas = [reply["meta_info"] for reply in (await server.post("/generate", body)).json()]
            found = await metrics(server)
            rows = sum(meta["spec_verify_ct"] for meta in metas)
            drafted = sum(meta["spec_num_proposed_drafts"] for meta in metas)
            accepted = sum(meta["spec_num_correct_drafts"] for meta in metas)
            assert drafted > 0
            assert found == {
                **found,
                "slipstream_verified_rows_total": rows,
                "slipstream_verified_tokens_total": rows + accepted,
                "slipstream_drafted_tokens_total": drafted,
                "slipstream_accepted_tokens_total": accepted,
                "slipstream_accept_length": 1 + accepted / rows,
                "vllm:spec_decode_num_drafts_total": rows,
                "vllm:spec_decode_num_draft_tokens_total": drafted,
                "vllm:spec_decode_num_accepted_tokens_total": accepted,
            }
            assert rows / 2 <= found["slipstream_verify_steps_total"] <= rows
            assert 0 <= found["slipstream_draft_len"] <= 3

    run(test)


def test_what_a_server_drafts_is_among_its_facts(model: Path) -> None:
    async def test() -> None:
        async with drafting(model, NGRAM) as server:
            info = (await server.get("/server_info")).json()
            assert info["speculative_algorithm"] == "NGRAM"
            assert info["speculative_num_draft_tokens"] == 4
            told = {"method": "ngram", "num_speculative_tokens": 3}
            assert info["vllm_config"]["speculative_config"] == told
        async with drafting(model, OFF) as server:
            info = (await server.get("/server_info")).json()
            assert info["speculative_algorithm"] is None
            assert info["vllm_config"]["speculative_config"] is None
            assert not [name for name in await metrics(server) if "spec" in name or "draft" in name]

    run(test)
