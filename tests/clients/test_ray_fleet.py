"""Servers on a Ray cluster of three nodes: one that is removed under load loses nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster

import recipes.run.opening
from recipes.actors.ray_fleet import RayFleet, node_address
from recipes.grpo import main
from tests.helpers.char_model import CharAddition, char_model, write_char_model
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.router_process import router_process, wait_for
from tests.helpers.serve_process import ServerProcess, fake_server

NUM_TOKENS = 100
NUM_REQUESTS = 60
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def router() -> Iterator[ServerProcess]:
    with router_process("policy='least_load'") as found:
        yield found


async def ask(http: httpx.AsyncClient, number: int) -> None:
    sampling = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"input_ids": [number, 3], "sampling_params": sampling}
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["output_ids"] == expected_tokens([number, 3], NUM_TOKENS)


def test_a_node_that_is_removed_under_load_loses_nothing(
    cluster: Cluster, router: ServerProcess
) -> None:
    doomed = cluster.add_node(**NODE)
    cluster.add_node(**NODE)
    code = fake_server(
        server=f"router={router.url!r}", factory="tests.helpers.paced_executor:build"
    )

    def command(_: str) -> list[str]:
        return [sys.executable, "-c", code]

    assert node_address() == cluster.head_node.node_ip_address
    fleet = RayFleet(command, count=2)
    try:
        wait_for(router.url, 2)
        # Each node has one of them; the third is for the one that will be lost.
        cluster.add_node(**NODE)

        async def load() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=router.url, timeout=300, limits=limits) as http:
                work = [asyncio.create_task(ask(http, n)) for n in range(NUM_REQUESTS)]
                await asyncio.sleep(0.2)
                await asyncio.to_thread(cluster.remove_node, doomed, False)
                await asyncio.gather(*work)

        asyncio.run(load())
        wait_for(router.url, 2)
        assert fleet.num_restarts == 1
    finally:
        fleet.close()


def test_a_run_has_its_engines_on_the_cluster(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes.run.opening, "select_environment", lambda *_, **__: CharAddition())
    model = tmp_path / "model"
    write_char_model(model, char_model(32, 2))
    text = "--steps 1 --eval-every 0 --eval-prompts 4 --checkpoint-every 0 --device cpu"
    text += f" --dtype float32 --kv-memory-gb 0.02 --prompts-per-step 4 --samples 4 --model {model}"
    for name, more in (("here", []), ("ray", ["--launch", "ray", "--rollout-gpus", "2"])):
        assert main([*text.split(), "--out", str(tmp_path / name), *more]) == 0
    here, there = (tmp_path / name / "samples.jsonl" for name in ("here", "ray"))
    assert here.read_text() == there.read_text()
