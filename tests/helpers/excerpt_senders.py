"""Trainer ranks as threads of this process, which send engine ranks what those take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from engine.errors import SlipstreamError
from engine.protocol import (
    BeginUpdate,
    JoinGroup,
    RankExcerpts,
    ReceiveExcerpts,
    TensorPiece,
    TensorSpec,
)
from engine.weights.service import WeightService
from tests.helpers.weight_engines import Tensors
from trainer_bridge.excerpt_plan import SendStage, plan_command, plan_sends
from trainer_bridge.excerpt_sender import ExcerptSender
from trainer_bridge.process_group import SenderGroup

NAME = "g"
CPU = torch.device("cpu")
Shards = list[tuple[TensorPiece, torch.Tensor]]


class Senders:
    """`size` trainer ranks and these engine ranks, in one group. The ranks are one engine's, or
    engines of their own: what they agree on is up to the test."""

    def __init__(
        self, ranks: Sequence[WeightService], size: int, *, timeout_s: float = 20.0
    ) -> None:
        self.ranks = ranks
        self.size = size
        self.timeout_s = timeout_s
        self.pool = ThreadPoolExecutor(size + len(ranks))
        self.ends: list[ExcerptSender] = []
        self._shards: list[Shards] = []
        self._stages: list[list[SendStage]] = []
        first = self._group(0, 0)
        groups: list[SenderGroup] = [first]
        joined = [self.pool.submit(self._join, first.port, place) for place in range(len(ranks))]
        groups += self.all(lambda rank: self._group(rank, first.port), range(1, size))
        self.all(lambda rank: groups[rank].connect(), range(size))
        for future in joined:
            future.result(timeout_s)
        self.ends = [ExcerptSender(group, CPU) for group in groups]

    def plan(self, manifest: Sequence[TensorSpec], shards: list[Shards], **sizes: int) -> None:
        """Have every engine rank say what it takes, and every sender plan."""
        self._shards = shards
        begin = BeginUpdate(version=0, manifest=list(manifest))
        pieces = [[piece for piece, _ in own] for own in shards]
        sizes = {"bucket_bytes": 2000, "direct_bytes": 256} | sizes
        command = plan_command(NAME, begin, pieces, timeout_s=self.timeout_s, **sizes)
        needs: list[RankExcerpts] = []
        for rank in self.ranks:
            needs += rank.handle(command).excerpts
        self._stages = [plan_sends(command, sender, needs) for sender in range(self.size)]

    def sends(self, shards: list[Shards] | None = None) -> list[Future[None]]:
        """Every trainer rank begins to send what it holds."""
        held = shards or self._shards
        return [self.pool.submit(self._send, rank, iter(held[rank])) for rank in range(self.size)]

    def receives(self) -> list[Future[Any]]:
        """Every engine rank begins to receive."""
        command = ReceiveExcerpts(group=NAME, timeout_s=self.timeout_s)
        return [self.pool.submit(rank.handle, command) for rank in self.ranks]

    def transfer(self, shards: list[Shards] | None = None) -> None:
        """All of it; raises the first error, if any, once all ended."""
        futures: list[Future[Any]] = [*self.sends(shards), *self.receives()]
        errors = [future.exception(self.timeout_s + 10) for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def all(self, act: Callable[[int], Any], ranks: range) -> list[Any]:
        """What `act` returns for each, at once."""
        return [f.result(self.timeout_s) for f in [self.pool.submit(act, r) for r in ranks]]

    def close(self) -> None:
        """Leave."""
        for end in self.ends:
            end.group.close()
        for rank in self.ranks:
            with suppress(SlipstreamError):
                rank.groups.leave(NAME)
        self.pool.shutdown()

    def _group(self, rank: int, port: int) -> SenderGroup:
        return SenderGroup(
            NAME,
            world_size=self.size + len(self.ranks),
            backend="gloo",
            port=port,
            timeout_s=self.timeout_s,
            rank=rank,
            senders=self.size,
        )

    def _join(self, port: int, place: int) -> None:
        rank = self.ranks[place]
        rank.handle(
            JoinGroup(
                name=NAME,
                address="127.0.0.1",
                port=port,
                # Ranks here are engines of their own to the group, so each has its own offset.
                rank_offset=self.size + place - rank.groups.rank,
                world_size=self.size + len(self.ranks),
                backend="gloo",
                senders=self.size,
                timeout_s=self.timeout_s,
            )
        )

    def _send(self, rank: int, shards: Iterator[tuple[TensorPiece, torch.Tensor]]) -> None:
        pieces = [piece for piece, _ in self._shards[rank]]
        deadline = time.monotonic() + self.timeout_s
        end = self.ends[rank]
        end.send(
            self._stages[rank], pieces, shards, deadline=deadline, check=end.group.check_stopped
        )


def cut_among(tensors: Tensors, size: int, *, by: str) -> list[Shards]:
    """What each of `size` trainer ranks holds. flat: uneven runs of each tensor; rows: as FSDP2
    deals them; tensors: whole ones, in turn; padded: as ZeRO-3 does, the last rank less."""
    shards: list[Shards] = [[] for _ in range(size)]
    for number, (name, tensor) in enumerate(tensors.items()):
        flat, numel = tensor.reshape(-1), tensor.numel()
        row = numel // tensor.shape[0]
        match by:
            case "flat":
                stops = [numel * (rank + 1) // size for rank in range(size)]
            case "rows":
                rows = -(-tensor.shape[0] // size)
                stops = [min(rows * (rank + 1), tensor.shape[0]) * row for rank in range(size)]
            case "padded":
                stops = [min(-(-numel // size) * (rank + 1), numel) for rank in range(size)]
            case _:
                stops = [0 if rank < number % size else numel for rank in range(size)]
        start = 0
        for rank, stop in enumerate(stops):
            if start < stop:
                dtype = str(tensor.dtype).removeprefix("torch.")
                piece = TensorPiece(name, dtype, list(tensor.shape), start, stop)
                shards[rank].append((piece, flat[start:stop]))
            start = max(start, stop)
    return shards
