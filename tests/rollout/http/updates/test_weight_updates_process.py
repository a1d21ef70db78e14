"""Weights into a spawned server over HTTP, by every way that needs no GPU."""

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from engine.errors import GroupError, ManifestMismatch, SlipstreamError, UpdateTimeout
from engine.protocol import GenerateRequest, SamplingParams
from rollout.client import Client
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.foreign_classes import flattened_bucket, foreign_classes
from tests.helpers.foreign_trainer import ForeignTrainer, free_port
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.http_target import HttpTarget

pytestmark = pytest.mark.slow

PROMPT = [3, 14, 15, 92, 65]
SIZES = {"tie_word_embeddings": True, "eos_token_id": 99}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "qwen3", seed=0, **SIZES)
    options = ["--model", str(folder / "config.json"), "--load-format", "random", "--port", "0"]
    options += [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--kv-memory",
        "0.02",
        "--enable-memory-saver",
    ]
    with ServerProcess(["-m", "rollout", "serve", *options]) as found:
        yield found


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as found:
        found.call("/continue_generation", {})
        yield found


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    """The model of this seed, under its Hugging Face names."""
    model = tiny_hf("qwen3", seed, **SIZES)
    return [(name, p.detach()) for name, p in model.named_parameters()]


def greedy(client: Client) -> tuple[list[int], str]:
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    (reply,) = client.generate(GenerateRequest(input_ids=PROMPT, sampling_params=sampling))
    return reply.output_ids, reply.meta_info["weight_version"]


def expected(seed: int, folder: Path) -> list[int]:
    """What an engine that loaded the model of this seed generates."""
    write_tiny(folder / str(seed), "qwen3", seed=seed, **SIZES)
    with make_replica(folder / str(seed)) as replica:
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        replica.submit([request("r", PROMPT, **options)])
        return drain(replica)["r"].token_ids.tolist()


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_broadcasts_of_a_foreign_trainer(
    client: Client, tmp_path: Path, load_format: str | None
) -> None:
    seed = 11 if load_format is None else 12
    tensors = weights(seed)
    half = len(tensors) // 2
    options = {"load_format": load_format, "flush_cache": False, "weight_version": f"v{seed}"}
    with ForeignTrainer(client, f"group-{seed}") as trainer:
        trainer.join()
        client.call("/pause_generation", {})
        client.call("/flush_cache")
        trainer.send(tensors[:half], **options)
        trainer.send(tensors[half:], **options)
        client.call("/continue_generation", {})
        assert greedy(client) == (expected(seed, tmp_path), f"v{seed}")
        client.call("/destroy_weights_update_group", {"group_name": f"group-{seed}"})


def test_a_bucket_of_pickled_tensors(client: Client, tmp_path: Path) -> None:
    tensors = weights(13)
    payload = base64.b64encode(pickle.dumps(tensors)).decode()
    body = {"serialized_named_tensors": [payload], "weight_version": "thirteen"}
    assert client.call("/update_weights_from_tensor", body)["success"]
    assert greedy(client) == (expected(13, tmp_path), "thirteen")


def test_a_flattened_bucket_with_class_paths_of_its_trainer(client: Client, tmp_path: Path) -> None:
    with foreign_classes() as classes:
        payload = base64.b64encode(pickle.dumps(flattened_bucket(classes, weights(16)))).decode()
    body = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket"}
    assert client.call("/update_weights_from_tensor", body)["success"]
    assert greedy(client)[0] == expected(16, tmp_path)


@pytest.mark.parametrize("num_buckets", [3, 4])
def test_a_trainer_that_dies_between_buckets_leaves_the_old_version(
    client: Client, tmp_path: Path, num_buckets: int
) -> None:
    before = greedy(client)
    tensors = weights(18)
    client.call("/pause_generation", {})
    for part in [tensors[start::4] for start in range(num_buckets)]:
        payload = base64.b64encode(pickle.dumps(part)).decode()
        body = {"serialized_named_tensors": [payload], "weight_version": "eighteen"}
        client.call("/update_weights_from_tensor", body)
    if num_buckets == 4:
        client.call("/continue_generation", {})
        assert greedy(client) == (expected(18, tmp_path), "eighteen")
        return
    with pytest.raises(ManifestMismatch, match="missing"):
        client.call("/continue_generation", {})
    client.call("/continue_generation", {})
    assert greedy(client) == before


def test_a_folder_that_lacks_tensors_is_loaded_only_as_partial(
    client: Client, tmp_path: Path
) -> None:
    before = greedy(client)
    tensors = dict(weights(19)[:5])
    save_file(tensors, tmp_path / "model.safetensors")
    body = {"model_path": str(tmp_path), "weight_version": "five tensors"}
    with pytest.raises(ManifestMismatch):
        client.call("/update_weights_from_disk", body)
    assert greedy(client) == before
    assert client.call("/update_weights_from_disk", {**body, "partial": True})["success"]
    assert greedy(client)[1] == "five tensors"


@pytest.mark.parametrize(
    "path",
    ["/proc/self/mem", "/proc/self", "/dev/null", "/dev/zero", "/etc/passwd", "/", "/a" * 2000,
     "/" + "a" * 300, "/absent/model.safetensors"],
)  # fmt: skip
def test_a_path_that_is_no_folder_of_weights_harms_nobody(client: Client, path: str) -> None:
    before = greedy(client)
    for call, field in (
        ("/update_weights_from_disk", "model_path"),
        ("/update_weights", "weight_dir"),
    ):
        with pytest.raises(SlipstreamError) as caught:
            client.call(call, {field: path})
        assert type(caught.value).__name__ in ("ModelNotFound", "CheckpointError", "InvalidRequest")
    body = {"local_checkpoint_dir": path, "source_dir": path, "target_version": 1}
    with pytest.raises(SlipstreamError):
        client.call("/pull_weights", body)
    assert greedy(client) == before


def test_a_pull_fills_a_folder_and_the_load_of_it_switches(client: Client, tmp_path: Path) -> None:
    before = greedy(client)
    ids = expected(31, tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "31").rename(tmp_path / "source" / "weight_v000031")
    local = str(tmp_path / "local")
    body = {"local_checkpoint_dir": local, "source_dir": str(tmp_path / "source")}
    assert client.call("/pull_weights", {**body, "target_version": 31})["success"]
    assert greedy(client) == before
    client.call("/pause_generation", {})
    client.call("/flush_cache")
    client.call("/update_weights_from_disk", {"model_path": local, "weight_version": "v31"})
    client.call("/continue_generation", {})
    assert greedy(client) == (ids, "v31")


def test_a_folder(client: Client, tmp_path: Path) -> None:
    ids = expected(14, tmp_path)
    folder = str(tmp_path / "14")
    assert client.call("/update_weights_from_disk", {"model_path": folder})["success"]
    found, version = greedy(client)
    assert found == ids
    assert int(version) > 0
    assert client.call("/update_weights", {"weight_dir": folder})["message"] == "Weights updated"
    assert greedy(client)[0] == ids


def test_a_colocated_step_releases_updates_and_resumes(client: Client, tmp_path: Path) -> None:
    client.call("/flush_cache")
    client.call("/release_memory_occupation", {})
    assert client.state().released == ["weights", "kv_cache", "cuda_graph"]
    with pytest.raises(SlipstreamError, match="released: weights"):
        client.call("/ready")
    with pytest.raises(SlipstreamError, match="weights"):
        client.call("/resume_memory_occupation", {"tags": ["kv_cache"]})
    client.call("/resume_memory_occupation", {"tags": ["weights"]})
    tensors = weights(17)
    for part in (tensors[:5], tensors[5:]):
        payload = base64.b64encode(pickle.dumps(part)).decode()
        body = {"serialized_named_tensors": [payload], "flush_cache": False}
        client.call("/update_weights_from_tensor", {**body, "weight_version": "slept"})
    client.call("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
    assert client.state().refusal == ""
    assert greedy(client) == (expected(17, tmp_path), "slept")


def test_a_part_is_no_answer_to_weights_that_are_gone(client: Client, tmp_path: Path) -> None:
    """And the reply does not say that anything serves."""
    save_file(dict(weights(18)[:3]), tmp_path / "part.safetensors")
    client.call("/weights_checker", {"action": "reset_tensors"})
    body = {"model_path": str(tmp_path / "part.safetensors"), "partial": True}
    with pytest.raises(ManifestMismatch, match=r"nothing serves \(.*noise.*Send the whole model"):
        client.call("/update_weights_from_disk", body)
    ids = expected(18, tmp_path)
    client.call("/update_weights_from_disk", {"model_path": str(tmp_path / "18")})
    assert greedy(client)[0] == ids


@pytest.mark.parametrize("transport", ["nccl", "cuda_ipc", "disk"])
def test_our_own_publisher_over_http(
    client: Client, server: ServerProcess, tmp_path: Path, transport: Any
) -> None:
    seed = 20 + len(transport)
    model = tiny_hf("qwen3", seed, **SIZES)
    version = client.state().version + 1
    options = PushOptions(transport=transport, folder=tmp_path / "published")
    with Publisher(model, [HttpTarget(server.url)], options) as publisher:
        publisher.push(version)
        publisher.push(version + 1)
    assert greedy(client) == (expected(seed, tmp_path), str(version + 1))


def test_a_failed_update_leaves_the_old_weights_and_says_why(client: Client) -> None:
    before = greedy(client)
    odd = [("model.norm.weight", torch.ones(3))]
    payload = base64.b64encode(pickle.dumps(odd)).decode()
    with pytest.raises(SlipstreamError, match=r"model\.norm\.weight") as caught:
        client.call("/update_weights_from_tensor", {"serialized_named_tensors": [payload]})
    assert type(caught.value).__name__ == "ManifestMismatch"
    harmful = base64.b64encode(pickle.dumps(print)).decode()
    with pytest.raises(SlipstreamError, match=r"builtins\.print"):
        client.call("/update_weights_from_tensor", {"serialized_named_tensors": [harmful]})
    with pytest.raises(SlipstreamError, match="absent"):
        client.call("/update_weights_from_disk", {"model_path": "/absent"})
    assert greedy(client) == before


def test_a_group_that_nobody_hosts_or_fills_fails_in_time_and_by_name(client: Client) -> None:
    body = {"master_address": "127.0.0.1", "rank_offset": 1, "backend": "gloo", "timeout_s": 1.0}
    body |= {"group_name": "absent", "master_port": free_port(), "world_size": 2}
    with pytest.raises(GroupError, match=f"127.0.0.1:{body['master_port']}"):
        client.call("/init_weights_update_group", body)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    body |= {"group_name": "short", "master_port": store.port, "world_size": 3}
    with pytest.raises(GroupError, match="rank"):
        client.call("/init_weights_update_group", body)
    del store


def test_a_trainer_that_stops_sending_costs_its_update_and_nothing_else(
    client: Client, tmp_path: Path
) -> None:
    before = greedy(client)
    tensors = weights(15)
    with ForeignTrainer(client, "stopping") as trainer:
        trainer.join()
        trainer.send(tensors[:2], flush_cache=False)
        names = [name for name, _ in tensors[2:]]
        body = {
            "names": names,
            "dtypes": ["float32"] * len(names),
            "shapes": [list(tensor.shape) for _, tensor in tensors[2:]],
            "group_name": "stopping",
            "timeout_s": 1.0,
        }
        with pytest.raises(SlipstreamError, match=r"stopping|model\.") as caught:
            client.call("/update_weights_from_distributed", body)
        assert isinstance(caught.value, GroupError | UpdateTimeout)
    client.call("/continue_generation", {})
    assert greedy(client) == before
    with ForeignTrainer(client, "stopping") as trainer:
        trainer.join()
        trainer.send(tensors, weight_version="after")
        assert greedy(client) == (expected(15, tmp_path), "after")
        client.call("/destroy_weights_update_group", {"group_name": "stopping"})


def test_checks_of_the_weights_that_serve(client: Client) -> None:
    one = client.call("/weights_checker", {"action": "checksum"})
    two = client.call("/weights_checker", {"action": "checksum"})
    assert one["success"]
    assert one["per_engine_checksum"] == two["per_engine_checksum"]
    assert len(one["ranks"][0]["checksums"]) > 10
    values = client.call("/get_weights_by_name?name=model.norm.weight&truncate_size=4")
    assert len(values) == 4
