"""What two trainer ranks do in `tests/trainer_bridge/test_sharded_carrier.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.errors import SlipstreamError
from engine.protocol import BeginUpdate
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.transports.sharded import ShardedCarrier

PROMPT = [5, 6, 7, 8, 9, 10]
STEPS = (("backwards", 0), ("first", 1), ("second", 2), ("again backwards", 1), ("third", 3))


def publish_some(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Updates that are refused between updates that are not; what each rank was told."""
    model = tiny_hf("qwen2", seed=9, tie_word_embeddings=True)
    source = PlainSource(model, rank=rank, world_size=size)
    replicas = []
    if rank == 0:
        write_tiny(folder / "model", "qwen2", tie_word_embeddings=True)
        replicas.append(make_replica(folder / "model"))
    carrier = ShardedCarrier(
        replicas, device=torch.device("cpu"), bucket_bytes=4096, timeout_s=20.0
    )
    told: dict[str, Any] = {}
    for name, version in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        try:
            begin = BeginUpdate(version=version, manifest=source.specs())
            told[name] = carrier.publish(begin, source).version
        except SlipstreamError as error:
            told[name] = f"{type(error).__name__}: {error}"
    carrier.close()
    if replicas:
        replica = replicas[0]
        replica.submit([request("r", PROMPT, temperature=0.0, max_new_tokens=12)])
        told["tokens"] = drain(replica)["r"].token_ids.tolist()
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            for _ in range(12):
                best = model(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], dim=1)
        told["wanted"] = ids[0, len(PROMPT) :].tolist()
        replica.close()
    return told
