"""Weights into a server on a GPU: CUDA IPC on one, both NCCL dialects between two."""

import base64
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from engine.protocol import GenerateRequest, SamplingParams
from rollout.client import Client
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.foreign_classes import flattened_bucket, foreign_classes
from tests.helpers.foreign_trainer import ForeignTrainer, PackageTrainer
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import tiny_hf, write_tiny

PROMPT = [3, 14, 15, 92, 65]
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    """The model of this seed in bfloat16 on the first GPU."""
    model = tiny_hf("qwen3", seed, **SIZES).to("cuda:0", torch.bfloat16)
    return [(name, p.detach()) for name, p in model.named_parameters()]


def greedy(client: Client) -> list[int]:
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    (reply,) = client.generate(GenerateRequest(input_ids=PROMPT, sampling_params=sampling))
    return reply.output_ids


def expected(seed: int, folder: Path) -> list[int]:
    write_tiny(folder / str(seed), "qwen3", seed=seed, dtype=torch.bfloat16, **SIZES)
    with make_replica(folder / str(seed), dtype="bfloat16", device="cuda") as replica:
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        replica.submit([request("r", PROMPT, **options)])
        return drain(replica)["r"].token_ids.tolist()


def start(folder: Path, *more: str) -> ServerProcess:
    write_tiny(folder / "start", "qwen3", seed=0, dtype=torch.bfloat16, **SIZES)
    options = ["--model", str(folder / "start"), "--port", "0", "--device", "cuda"]
    options += ["--dtype", "bfloat16", "--kv-memory", "0.1", *more]
    return ServerProcess(["-m", "rollout", "serve", *options], start_s=300.0)


@pytest.fixture
def by_uuid(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pickle CUDA tensors as SGLang's patched reductions do; yields its classes."""
    original = reductions.reduce_tensor
    with foreign_classes() as classes:

        def reduce(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
            _, arguments = original(tensor)
            uuid = str(torch.cuda.get_device_properties(arguments[6]).uuid)
            changed = (*arguments[:6], uuid, *arguments[7:])
            return classes._rebuild_cuda_tensor_modified, changed

        monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, reduce)  # type: ignore[attr-defined]
        yield classes


@pytest.mark.gpu
def test_colocated_buckets_by_cuda_ipc(tmp_path: Path, by_uuid: Any) -> None:
    with start(tmp_path, "--enable-memory-saver") as server, server.client() as client:
        for seed in (1, 2):
            client.call("/pause_generation", {})
            client.call("/flush_cache")
            client.call("/release_memory_occupation", {})
            client.call("/resume_memory_occupation", {"tags": ["weights"]})
            tensors = weights(seed)
            half = len(tensors) // 2
            for part in (tensors[:half], tensors[half:]):
                bucket = flattened_bucket(by_uuid, part)
                payload = base64.b64encode(bytes(ForkingPickler.dumps(bucket))).decode()
                body = {
                    "serialized_named_tensors": [payload],
                    "load_format": "flattened_bucket",
                    "flush_cache": False,
                    "weight_version": str(seed),
                }
                assert client.call("/update_weights_from_tensor", body)["success"]
                # The reply says that the copies are done: overwrite what was lent.
                bucket["flattened_tensor"].fill_(255)
            client.call("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
            client.call("/continue_generation", {})
            assert client.call("/weight_version") == {"weight_version": str(seed)}
            assert greedy(client) == expected(seed, tmp_path)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_broadcasts_of_a_torch_group(tmp_path: Path, load_format: str | None) -> None:
    torch.cuda.set_device(0)
    with start(tmp_path, "--base-gpu", "1") as server, server.client() as client:
        for seed in (1, 2):
            with ForeignTrainer(client, "slime-pp_0", backend="nccl") as trainer:
                trainer.join()
                trainer.send(weights(seed), load_format=load_format)
                client.call("/destroy_weights_update_group", {"group_name": "slime-pp_0"})
            assert greedy(client) == expected(seed, tmp_path)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_broadcasts_of_a_raw_communicator(tmp_path: Path, packed: bool) -> None:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    with start(tmp_path, "--base-gpu", "1") as server, server.client() as client:
        with closing(PackageTrainer(client, device)) as trainer:
            trainer.join()
            for seed in (1, 2):
                client.call("/pause?mode=keep", {})
                trainer.send(weights(seed), packed=packed)
                client.call("/resume", {})
                assert greedy(client) == expected(seed, tmp_path)
        client.call("/shutdown_weight_transfer_engine", {})
