"""What two trainer ranks do in `tests/trainer_bridge/test_sharded_carrier.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import EngineDead, SlipstreamError
from engine.protocol import (
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    JoinGroup,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveExcerpts,
    TensorPiece,
)
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.faulty_target import FaultyTarget
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.transports.sharded import ShardedCarrier

PROMPT = [5, 6, 7, 8, 9, 10]
STEPS = (("backwards", 0), ("first", 1), ("second", 2), ("again backwards", 1), ("third", 3))


class Stalling(PlainSource):
    """A source that fails half-way through its shards when it is told to."""

    fails = False

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        for place, shard in enumerate(super().shards()):
            if self.fails and place == 5:
                raise RuntimeError("the gather failed")
            yield shard


RECEIVES = {"excerpts": ReceiveExcerpts, "broadcasts": ReceiveBroadcast}


def publish_despite_faults(rank: int, size: int, folder: Path, *, way: Any) -> dict[str, Any]:
    """Updates of two engines between which a rank or an engine fails; what each rank was told,
    how long it took, and what the engines then served."""
    model = tiny_hf("qwen2", seed=9, tie_word_embeddings=True)
    source = Stalling(model, rank=rank, world_size=size)
    engines = []
    if rank == 0:
        write_tiny(folder / "model", "qwen2", tie_word_embeddings=True)
        engines = [FaultyTarget(make_replica(folder / "model")) for _ in range(2)]
    carrier = ShardedCarrier(
        engines, device=torch.device("cpu"), bucket_bytes=4096, timeout_s=60, way=way
    )
    told: dict[str, Any] = {}

    def publish(step: str, version: int) -> None:
        started = time.monotonic()
        try:
            begin = BeginUpdate(version=version, manifest=source.specs())
            answer = str(carrier.publish(begin, source).version)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        served = [target.engine.state().version for target in engines]
        told[step] = (answer, time.monotonic() - started, served)

    def fail(place: int, kind: type, **how: Any) -> None:
        if engines:
            engines[place].fail(kind, EngineDead("it is gone", field="leader"), **how)

    publish("first", 1)
    for failing in range(size):
        source.fails = rank == failing
        publish(f"rank {failing} fails", 2)
    source.fails = False
    fail(1, RECEIVES[way])
    publish("no receive", 2)
    fail(0, JoinGroup)
    publish("no join", 2)
    fail(1, PrepareUpdate)
    publish("no prepare", 2)
    fail(1, CommitUpdate, times=99)
    publish("no commit", 2)
    for target in engines:
        target.heal()
    publish("again", 2)
    if engines:
        engines[1].restart(make_replica(folder / "model"))
    publish("restarted", 3)
    carrier.close()
    told["same"] = [_tokens(target.engine) for target in engines]
    for target in engines:
        target.engine.close()
    return told


def _tokens(replica: Any) -> list[int]:
    replica.submit([request("r", PROMPT, temperature=0.0, max_new_tokens=12)])
    return drain(replica)["r"].token_ids.tolist()


def publish_some(rank: int, size: int, folder: Path, *, way: Any, copies: int) -> dict[str, Any]:
    """Updates that are refused between updates that are not; what each rank was told, and what two
    requests got, one a copy where there are two. copies: of the model, in the engine."""
    model = tiny_hf("qwen2", seed=9, tie_word_embeddings=True)
    source = PlainSource(model, rank=rank, world_size=size)
    replicas = []
    if rank == 0:
        write_tiny(folder / "model", "qwen2", tie_word_embeddings=True)
        replicas.append(make_replica(folder / "model", dp_size=copies))
    carrier = ShardedCarrier(
        replicas, device=torch.device("cpu"), bucket_bytes=4096, timeout_s=20.0, way=way
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
        asked = [request(rid, PROMPT, temperature=0.0, max_new_tokens=12) for rid in "ab"]
        replica.submit(asked)
        outputs = drain(replica)
        told["tokens"] = [outputs[rid].token_ids.tolist() for rid in "ab"]
        # Raises where copies differ.
        told["ranks"] = len(replica.send(CheckWeights()).weights)
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            for _ in range(12):
                best = model(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], dim=1)
        told["wanted"] = ids[0, len(PROMPT) :].tolist()
        replica.close()
    return told
