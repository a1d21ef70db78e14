"""Health while serving, paused and stuck; facts in both dialects; metrics."""

import asyncio
from dataclasses import replace

import pytest

import rollout.http.status.health_routes as health
from tests.helpers.http_app import run, serving
from tests.helpers.replicas import fake_config

PATHS = ["/health", "/ready", "/health_generate"]


def test_a_paused_server_is_healthy_and_not_ready() -> None:
    async def test() -> None:
        async with serving() as server:
            for path in PATHS:
                assert (await server.get(path)).status_code == 200
            probes = len(server.link.requests)
            assert probes == 1
            await server.post("/pause_generation")
            found = [(await server.get(path)).status_code for path in PATHS]
            assert found == [200, 503, 200]
            assert len(server.link.requests) == probes
            await server.post("/continue_generation")
            assert (await server.get("/ready")).status_code == 200

    run(test)


def test_released_weights_are_healthy_and_not_ready() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/release_memory_occupation", {"tags": ["weights"]})
            found = [(await server.get(path)).status_code for path in PATHS]
            assert found == [200, 503, 200]
            reply = await server.get("/ready")
            assert "released: weights" in reply.json()["error"]["message"]

    run(test)


def test_a_probe_without_an_answer_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PROBE_S", 0.05)

    async def test() -> None:
        async with serving() as server:
            server.link.leader.can_step = lambda: False  # type: ignore[method-assign]
            reply = await server.get("/health_generate")
            assert reply.status_code == 503
            assert reply.json()["error"]["field"] == "probe"
            assert server.engine.num_open == 0

    run(test)


def test_a_command_that_blocks_the_engine_blocks_no_information() -> None:
    async def test() -> None:
        async with serving() as server:
            assert (await server.get("/server_info")).status_code == 200
            server.link.silent = True
            body = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2}
            joining = asyncio.create_task(server.post("/init_weights_update_group", body))
            await asyncio.sleep(0.01)
            for path in ("/health", "/ready", "/server_info", "/v1/loads", "/metrics"):
                assert (await server.get(path)).status_code == 200, path
            server.link.silent = False
            server.link.post([])
            assert (await joining).status_code == 200

    run(test)


def test_facts_in_both_dialects() -> None:
    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            info = (await server.get("/get_server_info")).json()
            assert info == {**info, "tp_size": 1, "pp_size": 1, "ep_size": 1, "num_gpus": 1}
            assert info["disaggregation_mode"] == "null"
            assert info["collectives"] == "one rank"
            assert info["max_total_num_tokens"] == 256 * 4
            assert info["vllm_config"]["weight_transfer_config"] == {"backend": "nccl"}
            assert info["vllm_config"]["model_config"]["dtype"] == "torch.float32"
            model = (await server.get("/get_model_info")).json()
            assert model["served_model_name"] == "mine"
            assert model["is_generation"]
            assert (await server.get("/get_world_size")).json() == {"world_size": 1}
            (listed,) = (await server.get("/v1/models")).json()["data"]
            assert (listed["id"], listed["max_model_len"]) == ("mine", 512)
            assert "version" in (await server.get("/version")).json()

    run(test)


def test_loads_count_what_waits_and_runs() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            body = {"input_ids": [[1], [2], [3]]}
            task = asyncio.create_task(server.post("/generate", body))
            while server.engine.num_open < 3:
                await asyncio.sleep(0)
            (load,) = (await server.get("/v1/loads?include=core")).json()["loads"]
            assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 3)
            assert 0 <= load["token_usage"] <= 1
            await server.post("/abort_request", {"abort_all": True})
            await task
            (load,) = (await server.get("/v1/loads")).json()["loads"]
            assert load["num_waiting_reqs"] == 0

    run(test)


def test_metrics_count_requests_tokens_and_updates() -> None:
    async def test() -> None:
        async with serving(engine=fake_config()) as server:
            body = {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 4}}
            await server.post("/generate", body)
            await server.post("/update_weights_from_disk", {"model_path": "/1"})
            text = (await server.get("/metrics")).text
            lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
            assert lines['slipstream_requests_total{reason="length"}'] == "2.0"
            assert lines["slipstream_output_tokens_total"] == "8.0"
            assert lines["slipstream_prompt_tokens_total"] == "3.0"
            assert lines["slipstream_version"] == "1.0"
            assert lines["slipstream_update_seconds_count"] == "1.0"
            assert lines["slipstream_first_token_seconds_count"] == "2.0"

    run(test)


def test_the_probe_shares_no_prefix_with_anyone() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.get("/health_generate")
            (probe,) = server.link.requests
            assert probe.salt
            assert probe.sampling.max_new_tokens == 1

    run(test)


def test_what_weights_are_stored_as_is_among_the_facts() -> None:
    async def test(scheme: str, told: str | None) -> None:
        engine = replace(fake_config(), quantization=scheme)
        async with serving(engine=engine) as server:
            info = (await server.get("/server_info")).json()
            assert info["quantization"] == told
            assert info["vllm_config"]["model_config"]["quantization"] == told

    run(lambda: test("none", None))
    run(lambda: test("int8", "int8"))
