"""Metrics as prime-rl reads them: vLLM's names, by engine."""

import asyncio
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.http_app import Server, run, serving


async def scraped(server: Server) -> dict[str, float]:
    """Samples of `vllm:*` by name, over their other labels; every one is of engine "0"."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families((await server.get("/metrics")).text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and not sample.name.endswith("_bucket"):
                assert sample.labels["engine"] == "0"
                assert sample.labels["model_name"] == "mine"
                found[sample.name] += sample.value
    return found


def test_names_that_clients_look_for() -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            asked = {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 4}}
            await server.post("/generate", asked)
            # A scrape may find the state of a second ago; this asks the engine.
            await server.get("/get_weight_version")
            found = await scraped(server)
            assert found == {
                **found,
                "vllm:prompt_tokens_total": 3,
                "vllm:generation_tokens_total": 8,
                "vllm:prefix_cache_queries_total": 3,
                "vllm:prefix_cache_hits_total": 0,
                "vllm:num_preemptions_total": 0,
                "vllm:request_success_total": 2,
                "vllm:num_requests_running": 0,
                "vllm:num_requests_waiting": 0,
                "vllm:time_to_first_token_seconds_count": 2,
                "vllm:e2e_request_latency_seconds_count": 2,
                "vllm:request_decode_time_seconds_count": 2,
                "vllm:request_prompt_tokens_sum": 3,
                "vllm:request_generation_tokens_sum": 8,
            }
            assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
            latency = found["vllm:e2e_request_latency_seconds_sum"]
            parts = ("vllm:time_to_first_token_seconds_sum", "vllm:request_decode_time_seconds_sum")
            assert latency > 0
            assert abs(sum(found[part] for part in parts) - latency) < 1e-6

    run(test)


def test_counters_are_there_before_anything_was_counted() -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            found = await scraped(server)
            assert found["vllm:prompt_tokens_total"] == 0
            assert found["vllm:e2e_request_latency_seconds_sum"] == 0

    run(test)


def test_what_waits_is_a_gauge() -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            task = asyncio.create_task(server.post("/generate", {"input_ids": [[1], [2]]}))
            while server.engine.num_open < 2:
                await asyncio.sleep(0)
            assert (await scraped(server))["vllm:num_requests_waiting"] == 2
            await server.post("/continue_generation")
            await task

    run(test)
