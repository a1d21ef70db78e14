"""What a server of several copies of a model says of them, and that any request may go to any."""

from __future__ import annotations

from dataclasses import replace

from engine.config import ParallelConfig
from tests.helpers.fake_copies import FakeCopies
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import run, serving
from tests.helpers.replicas import fake_config

COPIES = replace(fake_config(), parallel=ParallelConfig(dp_size=3, tp_size=2))


def test_a_trainer_is_told_of_all_ranks() -> None:
    async def test() -> None:
        async with serving(engine=COPIES, executor=FakeCopies) as server:
            info = (await server.get("/server_info")).json()
            assert info == {**info, "tp_size": 2, "dp_size": 3, "num_gpus": 6, "ep_size": 1}
            assert info["max_total_num_tokens"] == 3 * 256 * 4
            parallel = info["vllm_config"]["parallel_config"]
            # As vLLM has it, its world_size is of one copy.
            assert (parallel["world_size"], parallel["data_parallel_size"]) == (2, 3)
            assert info["vllm_config"]["scheduler_config"]["max_num_seqs"] == 3 * 32
            assert (await server.get("/get_world_size")).json() == {"world_size": 6}

    run(test)


def test_each_copy_has_gauges_and_a_batch_is_divided() -> None:
    async def test() -> None:
        async with serving(engine=COPIES, executor=FakeCopies) as server:
            prompts = [[number + 1, 2] for number in range(6)]
            body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 5}}
            replies = (await server.post("/generate", body)).json()
            found = [reply["output_ids"] for reply in replies]
            assert found == [expected_tokens(prompt, 5) for prompt in prompts]
            # Whoever updates asks what the engine does.
            await server.post("/update_weights_from_disk", {"model_path": "/1"})
            text = (await server.get("/metrics")).text
            lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
            assert lines["slipstream_output_tokens_total"] == "30.0"
            assert lines["slipstream_steps_total"] == "5.0"
            for copy in range(3):
                label = f'{{dp_rank="{copy}"}}'
                assert lines[f"slipstream_copy_num_running{label}"] == "0.0"
                assert lines[f"slipstream_copy_free_pages{label}"] == "256.0"

    run(test)


def test_one_copy_has_no_gauges_of_its_own() -> None:
    async def test() -> None:
        async with serving() as server:
            assert "slipstream_copy_" not in (await server.get("/metrics")).text

    run(test)
