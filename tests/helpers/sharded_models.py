"""A tiny model as DeepSpeed and FSDP2 shard it, in processes of `rank_processes`."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.helpers.tiny_models import tiny_hf

BUCKET_BYTES = 20_000


def model() -> Any:
    """Odd sizes, so that no part of two is like the other; a tied head."""
    return tiny_hf(
        "qwen2", vocab_size=101, hidden_size=32, intermediate_size=57, tie_word_embeddings=True
    )


def zero(stage: int, dtype: torch.dtype = torch.float32) -> Any:
    """A DeepSpeedEngine over `model()`."""
    import deepspeed

    # Compiled for a minute at the first use, and it waits for a lost rank for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    module = model()
    parameters = list(module.parameters())
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config)
    return engine


def fsdp(size: int, *, replicas: int = 1) -> Any:
    """`model()` sharded over all ranks, or over size / replicas of them, several times."""
    module = model()
    shape, names = ((size,), ("shard",))
    if replicas > 1:
        shape, names = (replicas, size // replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def train_once(engine: Any, rank: int) -> None:
    """One step, on other data on every rank, so that the weights are no longer the initial."""
    ids = torch.arange(8).reshape(1, 8) + rank
    by_deepspeed = hasattr(engine, "backward")
    # Before the forward pass, which leaves FSDP's root gathered.
    optimizer = None if by_deepspeed else torch.optim.AdamW(engine.parameters(), lr=1e-2)
    loss = engine(input_ids=ids, labels=ids).loss
    if optimizer is None:
        engine.backward(loss)
        engine.step()
    else:
        loss.backward()
        optimizer.step()
