"""What each rank sees of a sharded mixture of experts; run by `rank_processes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.helpers.expert_families import WITH_BIAS, tiny_experts
from tests.helpers.source_ranks import Results, seen
from trainer_bridge.adapters.fitting import source_of

EXPERTS = 7
"""In no equal parts of two."""


def model(family: str) -> Any:
    return tiny_experts(family, experts=EXPERTS)


def expert_sources(rank: int, size: int, folder: Path) -> Results:
    """By family, the sources of ZeRO-3 and FSDP2."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    mesh = init_device_mesh("cpu", (size,))
    results: Results = {}
    for family in WITH_BIAS:
        sharded = model(family)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        results[f"fsdp {family}"] = seen(source_of(fully_shard(sharded, mesh=mesh)))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        }
        engine, *_ = deepspeed.initialize(model=model(family), config=config)
        results[f"zero3 {family}"] = seen(source_of(engine, dtype=torch.bfloat16))
    return results
