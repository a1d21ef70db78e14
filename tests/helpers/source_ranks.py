"""What each rank sees of the weight sources; run by `rank_processes`."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine.errors import UnsupportedOption
from tests.helpers import sharded_models as models
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.deepspeed import DeepSpeedSource
from trainer_bridge.adapters.fitting import source_of
from trainer_bridge.adapters.fsdp import FsdpSource

Results = dict[str, Any]


def deepspeed_sources(rank: int, size: int, folder: Path) -> Results:
    """By stage: the initial weights and those after a step."""
    results: Results = {}
    for stage in range(4):
        engine = models.zero(stage)
        results[f"zero{stage}"] = seen(DeepSpeedSource(engine, bucket_bytes=models.BUCKET_BYTES))
        models.train_once(engine, rank)
        results[f"zero{stage}-trained"] = seen(source_of(engine))
    rounded = DeepSpeedSource(models.zero(3), dtype=torch.bfloat16, bucket_bytes=1)
    results["zero3-bfloat16"] = seen(rounded)
    results["zero3-gathered"] = most_gathered(models.zero(3))
    return results


def fsdp_sources(rank: int, size: int, folder: Path) -> Results:
    """The initial weights, those after a step, and what cannot be sent."""
    sharded = models.fsdp(size)
    source = FsdpSource(sharded, bucket_bytes=models.BUCKET_BYTES)
    results = {"fsdp": seen(source), "fsdp-alive": most_alive(source)}
    models.train_once(sharded, rank)
    with torch.no_grad():
        sharded(input_ids=torch.arange(4)[None])
    results["fsdp-trained"] = seen(source_of(sharded))
    results["fsdp-bfloat16"] = seen(FsdpSource(sharded, dtype=torch.bfloat16))
    results["fsdp-replicas"] = seen(FsdpSource(models.fsdp(size, replicas=2)))
    results["columns"] = refusal_of_columns(size)
    return results


def seen(source: WeightSource) -> Results:
    """Everything that a source says, copied."""
    return {
        "lasting": source.lasting,
        "specs": source.specs(),
        "tensors": [(name, tensor.clone()) for name, tensor in source.tensors()],
        "shards": [(piece, flat.clone()) for piece, flat in source.shards()],
    }


def most_gathered(engine: Any) -> int:
    """Most bytes of parameters that ZeRO-3 holds whole while its source is read."""
    most = 0
    for _ in DeepSpeedSource(engine, bucket_bytes=models.BUCKET_BYTES).tensors():
        whole = [p for p in engine.parameters() if p.ds_status.name == "AVAILABLE"]
        most = max(most, sum(p.ds_numel * p.element_size() for p in whole))
    return most


def most_alive(source: WeightSource) -> int:
    """Most bytes of yielded tensors that are not freed while others are yielded."""
    most, yielded = 0, []
    for _, tensor in source.tensors():
        yielded.append((weakref.ref(tensor), tensor.numel() * tensor.element_size()))
        most = max(most, sum(size for alive, size in yielded if alive() is not None))
    return most


def refusal_of_columns(size: int) -> str:
    """What a module sharded by columns answers."""
    mesh = init_device_mesh("cpu", (size,))
    module = torch.nn.Linear(4, 6, bias=False)
    module.weight = torch.nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(1)]))
    try:
        list(FsdpSource(module).shards())
    except UnsupportedOption as error:
        return f"{error.field}: {error}"
    return ""
