"""Weights by broadcast from every trainer rank at once: each sends the pieces that it holds.

Called collectively: every trainer rank builds a `ShardedCarrier` and calls `publish` on it.
Trainer rank 0 speaks with the engines; the others only send. Each trainer rank hosts a group
of its own with all engine ranks, so that no tensor passes through another trainer rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import GroupError, SlipstreamError
from engine.protocol import (
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    TensorPiece,
    UpdateReport,
    decode,
    encode,
)
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.control import UpdateTarget, state_of, try_send
from trainer_bridge.process_group import Backend, SenderGroup
from trainer_bridge.transports.base import give_up, on_each, report_of
from trainer_bridge.transports.nccl import BUCKET_BYTES, Broadcaster, check, join_commands


class ShardedCarrier:
    """One trainer rank's part of a sharded update.

    targets: the engines, on trainer rank 0; empty elsewhere. trainer_group: a gloo group of
    all trainer ranks (None takes the default group), for small Python objects only.
    address: under which the engines reach this rank.
    """

    def __init__(
        self,
        targets: Sequence[UpdateTarget],
        *,
        device: torch.device,
        trainer_group: dist.ProcessGroup | None = None,
        address: str = "127.0.0.1",
        name: str = "slipstream",
        bucket_bytes: int = BUCKET_BYTES,
        timeout_s: float = 300.0,
    ) -> None:
        self.targets = targets
        self._device = device
        self._trainers = trainer_group
        self._rank = dist.get_rank(trainer_group)
        self._address = address
        self._name = name
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._sender: Broadcaster | None = None
        self._pieces: list[list[TensorPiece]] = []

    def publish(self, begin: BeginUpdate, source: WeightSource) -> UpdateReport:
        """One transaction, collective over the trainer ranks; see `transports.base.publish`.

        begin: equal on all ranks. Every rank gets the report, or an error: its own, or a
        GroupError that quotes the rank that failed.
        """
        committed = False
        try:
            self._agree(self._prepare, begin, source)
            self._agree(self._carry, source)
            report: UpdateReport = self._agree(self._commit, begin)
            committed = True
        finally:
            if not committed:
                give_up(self.targets, begin.version)
        return report

    def close(self) -> None:
        """Leave the engines. Idempotent."""
        sender, self._sender = self._sender, None
        if sender is not None:
            for target in self.targets:
                for rank in range(len(self._pieces)):
                    try_send(target, LeaveGroup(name=self._group_of(rank)))
            sender.group.close()

    def _agree(self, act: Any, *args: Any) -> Any:
        """Run a stage on every trainer rank; if one fails, all raise. Returns rank 0's result."""
        result: Any = None
        failure: SlipstreamError | None = None
        try:
            result = act(*args)
        except SlipstreamError as error:
            failure = error
        outcomes: list[Any] = [None] * dist.get_world_size(self._trainers)
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(outcomes, (text, result), group=self._trainers)
        if failure is not None:
            raise failure
        for rank, (other, _) in enumerate(outcomes):
            if other is not None:
                raise GroupError(f"trainer rank {rank} failed: {other}", field=f"rank {rank}")
        return outcomes[0][1]

    def _prepare(self, begin: BeginUpdate, source: WeightSource) -> None:
        on_each(self.targets, lambda target: target.send(begin))
        if self._sender is None or not self._sender.group.is_open:
            self._connect()
        if not self._pieces:
            self._pieces = self._gather_pieces(source)

    def _connect(self) -> None:
        """Every rank listens, rank 0 has the engines join all groups, every rank completes."""
        backend: Backend = "nccl" if self._device.type == "cuda" else "gloo"
        sizes = self._share([state_of(target).tp_size for target in self.targets])
        group = SenderGroup(
            self._group_of(self._rank),
            world_size=1 + sum(sizes),
            backend=backend,
            address=self._address,
            timeout_s=self._timeout_s,
        )
        joins = self._gather(join_commands(group, sizes))
        with ThreadPoolExecutor(max(len(self.targets), 1)) as pool:
            joined = [
                pool.submit(_join_all, target, [commands[index] for commands in joins])
                for index, target in enumerate(self.targets)
            ]
            try:
                group.connect()
            except GroupError:
                check(joined)
                raise
        check(joined, wait=True)
        self._sender = Broadcaster(group, self._device, bucket_bytes=self._bucket_bytes)

    def _carry(self, source: WeightSource) -> None:
        assert self._sender is not None, "carry before prepare"
        deadline = time.monotonic() + self._timeout_s
        flats = (flat for _, flat in source.shards())
        with ThreadPoolExecutor(max(len(self.targets), 1)) as pool:
            received = [pool.submit(self._receive_all, target) for target in self.targets]
            try:
                self._send(flats, deadline, received)
            except SlipstreamError:
                self._sender.group.abort()
                raise
        check(received, wait=True)

    def _send(self, flats: Any, deadline: float, received: list[Future[None]]) -> None:
        assert self._sender is not None
        pieces = self._pieces[self._rank]
        self._sender.send(pieces, flats, deadline=deadline, check=lambda: check(received))

    def _receive_all(self, target: UpdateTarget) -> None:
        """Have one engine receive from every trainer rank in turn."""
        for rank, pieces in enumerate(self._pieces):
            target.send(
                ReceiveBroadcast(
                    group=self._group_of(rank),
                    tensors=pieces,
                    bucket_bytes=self._bucket_bytes,
                    timeout_s=self._timeout_s,
                )
            )

    def _group_of(self, rank: int) -> str:
        return f"{self._name}-{rank}"

    def _commit(self, begin: BeginUpdate) -> UpdateReport | None:
        if not self.targets:
            return None
        commit = CommitUpdate(version=begin.version)
        return report_of(on_each(self.targets, lambda target: target.send(commit)))

    def _gather_pieces(self, source: WeightSource) -> list[list[TensorPiece]]:
        """What each rank sends; fixed by the trainer's layout, so it is asked for once."""
        return self._gather([piece for piece, _ in source.shards()])

    def _gather(self, mine: list[Any]) -> list[list[Any]]:
        gathered: list[Any] = [None] * dist.get_world_size(self._trainers)
        kind = type(mine[0]) if mine else TensorPiece
        dist.all_gather_object(gathered, encode(mine), group=self._trainers)
        return [decode(data, list[kind]) for data in gathered]  # type: ignore[valid-type]

    def _share(self, mine: list[int]) -> list[int]:
        """Rank 0's list, on every rank."""
        box: list[Any] = [mine]
        dist.broadcast_object_list(box, group=self._trainers, group_src=0)
        shared: list[int] = box[0]
        return shared


def _join_all(target: UpdateTarget, joins: Sequence[JoinGroup]) -> None:
    for join in joins:
        try_send(target, LeaveGroup(name=join.name))
        target.send(join)
