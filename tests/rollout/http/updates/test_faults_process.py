"""Faults of weight updates over HTTP, one by one: each has its own error in time, and the engine
then serves what it served before, or refuses as it said."""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import (
    GroupError,
    ManifestMismatch,
    MemoryReleased,
    SlipstreamError,
    UpdateOrder,
)
from engine.protocol import GenerateRequest, SamplingParams
from engine.protocol.deadlines import LAUNCH_S, MAX_TIMEOUT_S, MEET_S
from rollout.client import Client
from tests.helpers.foreign_trainer import ForeignTrainer, free_port
from tests.helpers.peers import until
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.http_target import HttpTarget
from trainer_bridge.process_group import SenderGroup

pytestmark = pytest.mark.slow

SIZES = {"tie_word_embeddings": True, "eos_token_id": 99}
NORM = "model.norm.weight"
JOINS = {
    "sglang": ("/init_weights_update_group", lambda body: body),
    "vllm": ("/init_weight_transfer_engine", lambda body: {"init_info": body}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "qwen3", seed=0, **SIZES)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    options = ["--model", str(folder), "--port", "0", "--device", "cpu", "--dtype", "float32"]
    options += ["--kv-memory", "0.02", "--enable-memory-saver"]
    with ServerProcess(["-m", "rollout", "serve", *options]) as found:
        yield found


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """A client; when the test is over, the weights must serve that served before it."""
    with server.client() as found:
        before = greedy(found)
        yield found
        assert found.state().open_update is None
        assert greedy(found) == before


def greedy(client: Client) -> list[int]:
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    asked = GenerateRequest(input_ids=[3, 14, 15, 92, 65], sampling_params=sampling)
    return client.generate(asked)[0].output_ids


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    model = tiny_hf("qwen3", seed, **SIZES)
    return [(name, p.detach()) for name, p in model.named_parameters()]


def pickled(tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """The body of a call that brings tensors and leaves the update open."""
    payload = base64.b64encode(pickle.dumps(tensors)).decode()
    return {"serialized_named_tensors": [payload], "flush_cache": False}


def command(client: Client, kind: str, **fields: Any) -> None:
    client.call("/command", {"type": kind, **fields})


def join_body(port: int, world_size: int, **changes: Any) -> dict[str, Any]:
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1}
    body |= {"backend": "gloo", "group_name": "g", "timeout_s": 1.0, "world_size": world_size}
    return body | changes


@pytest.mark.parametrize("dialect", JOINS)
def test_a_wrong_world_size(client: Client, dialect: str) -> None:
    path, wrapped = JOINS[dialect]
    with pytest.raises(GroupError, match=r"world_size 1.* rank 0") as caught:
        client.call(path, wrapped(join_body(free_port(), 1)))
    assert caught.value.field == "world_size"


def test_a_world_size_that_only_one_side_has(client: Client) -> None:
    """The trainer waits for two ranks and the engine was told that it is the only one."""
    sender = SenderGroup("g", world_size=3, backend="gloo", timeout_s=2.0)
    with ThreadPoolExecutor(1) as pool:
        body = join_body(sender.port, 2, timeout_s=5.0)
        asked = pool.submit(client.call, JOINS["sglang"][0], body)
        until(lambda: sender.num_arrived() == 1 or asked.done(), LAUNCH_S)
        with pytest.raises(GroupError, match="rank 2 of 3 did not join group 'g'"):
            sender.connect()
        with pytest.raises(GroupError, match="group 'g'"):
            asked.result(LAUNCH_S)


def test_a_rank_that_never_joins(client: Client) -> None:
    port = free_port()
    sender = SenderGroup("g", world_size=3, backend="gloo")
    with pytest.raises(GroupError, match=f"127.0.0.1:{port} within 1 s"):
        client.call(JOINS["sglang"][0], join_body(port, 2))
    with pytest.raises(GroupError, match="rank 2 of 3 did not join") as caught:
        client.call(JOINS["sglang"][0], join_body(sender.port, 3, timeout_s=6.0))
    assert caught.value.field == "rank 2"


def test_names_the_model_does_not_have(client: Client) -> None:
    odd = ("model.layers.7.absent", torch.ones(2))
    with pytest.raises(ManifestMismatch, match="no tensor of this model") as caught:
        client.call("/update_weights_from_tensor", pickled([odd]))
    assert caught.value.field == odd[0]
    spec = {"name": odd[0], "dtype": "float32", "shape": [2]}
    with pytest.raises(ManifestMismatch, match="no tensor of this model") as caught:
        command(client, "begin_update", version=client.state().version + 1, manifest=[spec])
    assert caught.value.field == odd[0]


def test_a_trainer_that_dies_in_a_bucket(client: Client) -> None:
    """Noticed when the connection breaks: the bucket's own deadline outlasts this test."""
    tensors = weights(5)
    sender = SenderGroup("dying", world_size=2, backend="gloo", timeout_s=MEET_S)
    body = join_body(sender.port, 2, group_name="dying", timeout_s=MEET_S)
    bucket = {
        "names": [name for name, _ in tensors],
        "dtypes": ["float32"] * len(tensors),
        "shapes": [list(tensor.shape) for _, tensor in tensors],
        "group_name": "dying",
        "timeout_s": MAX_TIMEOUT_S,
    }
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(client.call, JOINS["sglang"][0], body)
        sender.connect()
        joined.result(MEET_S)
        asked = pool.submit(client.call, "/update_weights_from_distributed", bucket)
        for _, tensor in tensors[:3]:
            sender.wait(sender.broadcast(tensor.contiguous()), time.monotonic() + MEET_S)
        sender.abort()
        with pytest.raises(GroupError, match="rank 0 of group 'dying' is gone") as caught:
            asked.result(LAUNCH_S)
    assert caught.value.field == tensors[3][0]
    with pytest.raises(SlipstreamError, match="dying"):
        client.call("/update_weights_from_distributed", bucket)
    client.call("/continue_generation", {})


def test_a_double_begin(client: Client) -> None:
    version = client.state().version + 1
    command(client, "begin_update", version=version)
    command(client, "begin_update", version=version)
    with pytest.raises(UpdateOrder, match=f"version {version} is open") as caught:
        command(client, "begin_update", version=version + 1)
    assert caught.value.field == "version"
    assert client.state().open_update == version
    command(client, "abort_update", version=version)


def test_an_update_during_sleep(client: Client, folder: Path) -> None:
    client.call("/release_memory_occupation", {})
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/begin_weight_update", {}),
        ("/start_weight_update", {}),
        ("/update_weights_from_tensor", pickled(weights(5))),
        ("/update_weights_from_disk", {"model_path": str(folder)}),
        ("/update_weights", {"weight_dir": str(folder)}),
        ("/command", {"type": "begin_update", "version": client.state().version + 1}),
    ]
    for path, body in calls:
        with pytest.raises(MemoryReleased, match="resume 'weights' first") as caught:
            client.call(path, body)
        assert caught.value.field == "weights", path
    client.call("/resume_memory_occupation", {})
    assert "publish a whole version" in client.state().refusal
    client.call("/update_weights_from_disk", {"model_path": str(folder)})


@pytest.mark.parametrize("dialect", ["sglang", "vllm"])
def test_a_resume_in_the_wrong_order(client: Client, folder: Path, dialect: str) -> None:
    client.call("/release_memory_occupation", {})
    for tag in ("kv_cache", "cuda_graph"):
        with pytest.raises(MemoryReleased, match="weights, then kv_cache, then cuda_graph") as late:
            if dialect == "sglang":
                client.call("/resume_memory_occupation", {"tags": [tag]})
            else:
                client.call(f"/wake_up?tags={tag}", {})
        assert late.value.field == tag
    assert client.state().released == ["weights", "kv_cache", "cuda_graph"]
    client.call("/resume_memory_occupation", {})
    client.call("/update_weights_from_disk", {"model_path": str(folder)})


def test_two_updates_at_once(client: Client, server: ServerProcess, tmp_path: Path) -> None:
    tensors = weights(5)
    client.call("/begin_weight_update", {})
    client.call("/update_weights_from_tensor", pickled(tensors[:3]))
    first = client.state().open_update
    assert first is not None
    with server.client() as other:
        with pytest.raises(UpdateOrder):
            other.call("/update_weights_from_disk", {"model_path": str(tmp_path)})
        with pytest.raises(UpdateOrder, match=f"version {first} is open"):
            command(other, "begin_update", version=first + 1)
    options = PushOptions(transport="disk", folder=tmp_path)
    model = tiny_hf("qwen3", 6, **SIZES)
    with (
        Publisher(model, [HttpTarget(server.url)], options) as publisher,
        pytest.raises(UpdateOrder, match=f"version {first} is open"),
    ):
        publisher.push(first + 1)
    assert client.state().open_update == first, "the others must not end it"
    with pytest.raises(UpdateOrder, match="begun by owner") as refused:
        command(client, "abort_update", version=first)
    owner = refused.value.message.partition("begun by owner '")[2].partition("'")[0]
    command(client, "abort_update", version=first, owner=owner)


@pytest.mark.parametrize("step", [0, -1])
def test_a_version_that_goes_backwards(client: Client, folder: Path, step: int) -> None:
    client.call("/update_weights_from_disk", {"model_path": str(folder)})
    version = client.state().version
    assert version > 0
    with pytest.raises(UpdateOrder, match=f"{version} serves now") as caught:
        command(client, "begin_update", version=version + step)
    assert caught.value.field == "version"
    if step:
        with pytest.raises(UpdateOrder, match="goes back") as caught:
            command(client, "set_version", version=version + step)
        assert caught.value.field == "version"
    assert client.state().version == version


def test_after_all_of_them_an_update_still_arrives(client: Client) -> None:
    """Last: the weights that come are those that serve, so that the fixture finds no change."""
    with ForeignTrainer(client, "healthy") as trainer:
        trainer.join()
        trainer.send(weights(0), weight_version="healthy")
        client.call("/destroy_weights_update_group", {"group_name": "healthy"})
    asked = GenerateRequest(input_ids=[1], sampling_params=SamplingParams(max_new_tokens=1))
    assert client.generate(asked)[0].meta_info["weight_version"] == "healthy"
