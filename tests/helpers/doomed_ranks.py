"""Trainer ranks of a sharded push, one of which is killed at a stage of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.protocol import BeginUpdate, TensorPiece
from tests.helpers.tiny_models import tiny_hf
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.http_target import HttpTarget
from trainer_bridge.transports.sharded import ShardedCarrier
from trainer_bridge.transports.sharded_excerpts import ExcerptWay

TIMEOUT_S = 8.0
FIRST_SEED, SECOND_SEED = 50, 51


class DoomedShards(PlainSource):
    """Killed while its tenth shard is asked for, if `dies`."""

    dies = False

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        for place, shard in enumerate(super().shards()):
            if self.dies and place == 9:
                die()
            yield shard


def trained(seed: int) -> Any:
    """The model of the first or the second update."""
    return tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def push_and_die(
    rank: int, size: int, folder: Path, *, victim: int, stage: str, mode: Any, url: str
) -> tuple[list[str], float]:
    """Two updates; `victim` is killed in the second, or where groups form for the first. What a
    rank was told of each, and how long the last one took it."""
    own = rank == victim
    if own and stage == "form":
        ExcerptWay._complete = die  # type: ignore[method-assign]
    if own and stage == "plan":
        ExcerptWay._plan = die  # type: ignore[method-assign]
    targets = [HttpTarget(url)] if rank == 0 else []
    carrier = ShardedCarrier(
        targets, device=torch.device("cpu"), bucket_bytes=4096, timeout_s=TIMEOUT_S
    )
    told, started = [], 0.0
    for version, seed in enumerate((FIRST_SEED, SECOND_SEED), start=1):
        source = DoomedShards(trained(seed), rank=rank, world_size=size)
        source.dies = own and stage == "carry" and version == 2
        if own and stage == "commit" and version == 2:
            carrier._commit = die  # type: ignore[method-assign]
        begin = BeginUpdate(
            version=version, manifest=source.specs(), mode=mode, timeout_s=2 * TIMEOUT_S
        )
        started = time.monotonic()
        try:
            told.append(str(carrier.publish(begin, source).version))
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
            break
    return told, time.monotonic() - started


class KillingShards(PlainSource):
    """Kills a process of the engine while its tenth shard is asked for."""

    victim = 0

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        for place, shard in enumerate(super().shards()):
            if self.victim and place == 9:
                os.kill(self.victim, signal.SIGKILL)
            yield shard


def push_and_kill(
    rank: int, size: int, folder: Path, *, url: str, pid: int
) -> tuple[list[str], float]:
    """Two updates of a served engine, one of whose processes is killed in the second: what a rank
    was told of each, and how long the last one took it."""
    targets = [HttpTarget(url)] if rank == 0 else []
    carrier = ShardedCarrier(targets, device=torch.device("cpu"), bucket_bytes=4096)
    told, started = [], 0.0
    for version in (1, 2):
        model = tiny_hf("qwen3", seed=version, eos_token_id=99, max_position_embeddings=4096)
        source = KillingShards(model, rank=rank, world_size=size)
        source.victim = pid if rank == size - 1 and version == 2 else 0
        started = time.monotonic()
        try:
            begin = BeginUpdate(version=version, manifest=source.specs())
            told.append(str(carrier.publish(begin, source).version))
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told, time.monotonic() - started
