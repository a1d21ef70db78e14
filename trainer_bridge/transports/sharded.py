"""Weights by broadcast from every trainer rank at once: each sends the pieces that it holds.

Called collectively: every trainer rank builds a `ShardedCarrier` and calls `publish` on it.
Trainer rank 0 speaks with the engines; the others only send. Each trainer rank hosts a group
of its own with all engine ranks, so that no tensor passes through another trainer rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
            connected = self._agree(self._begin, begin)
            if not all(connected):
                self._connect(source)
            self._agree(self._carry, source)
            report: UpdateReport = self._agree(self._commit, begin)[0]
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

    def _agree(self, act: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a stage on every trainer rank; returns all results, or raises on all ranks.

        A stage makes no collective call of its own: one that failed alone would leave the
        others waiting in it.
        """
        result: Any = None
        failure: SlipstreamError | None = None
        try:
            result = act(*args)
        except SlipstreamError as error:
            failure = error
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        outcomes: list[Any] = [None] * dist.get_world_size(self._trainers)
        dist.all_gather_object(outcomes, (text, result), group=self._trainers)
        if failure is not None:
            raise failure
        for rank, (other, _) in enumerate(outcomes):
            if other is not None:
                raise GroupError(f"trainer rank {rank} failed: {other}", field=f"rank {rank}")
        return [result for _, result in outcomes]

    def _begin(self, begin: BeginUpdate) -> bool:
        """Open the update; returns whether this rank still has its group."""
        on_each(self.targets, lambda target: target.send(begin))
        return self._sender is not None and self._sender.group.is_open

    def _connect(self, source: WeightSource) -> None:
        """Every rank listens, rank 0 has the engines join all groups, every rank completes."""
        sizes = self._agree(self._target_sizes)[0]
        joins = self._agree(self._listen, sizes)
        self._agree(self._complete, joins)
        # Fixed by the trainer's layout, so asked for with the connection.
        self._pieces = self._agree(lambda: [piece for piece, _ in source.shards()])

    def _target_sizes(self) -> list[int]:
        return [state_of(target).tp_size for target in self.targets]

    def _listen(self, sizes: list[int]) -> list[JoinGroup]:
        """Open this rank's group; returns what each target is to do to join it."""
        backend: Backend = "nccl" if self._device.type == "cuda" else "gloo"
        group = SenderGroup(
            self._group_of(self._rank),
            world_size=1 + sum(sizes),
            backend=backend,
            address=self._address,
            timeout_s=self._timeout_s,
        )
        self._sender = Broadcaster(group, self._device, bucket_bytes=self._bucket_bytes)
        return join_commands(group, sizes)

    def _complete(self, joins: list[list[JoinGroup]]) -> None:
        assert self._sender is not None, "complete before listen"
        with ThreadPoolExecutor(max(len(self.targets), 1)) as pool:
            joined = [
                pool.submit(_join_all, target, [commands[index] for commands in joins])
                for index, target in enumerate(self.targets)
            ]
            try:
                self._sender.group.connect()
            except GroupError:
                check(joined)
                raise
        check(joined, wait=True)

    def _carry(self, source: WeightSource) -> None:
        assert self._sender is not None, "carry before connect"
        deadline = time.monotonic() + self._timeout_s
        pieces = self._pieces[self._rank]
        flats = (flat for _, flat in source.shards())
        with ThreadPoolExecutor(max(len(self.targets), 1)) as pool:
            received = [pool.submit(self._receive_all, target) for target in self.targets]
            try:
                self._sender.send(pieces, flats, deadline=deadline, check=lambda: check(received))
            except SlipstreamError:
                self._sender.group.abort()
                raise
        check(received, wait=True)

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

    def _commit(self, begin: BeginUpdate) -> UpdateReport | None:
        if not self.targets:
            return None
        commit = CommitUpdate(version=begin.version)
        return report_of(on_each(self.targets, lambda target: target.send(commit)))

    def _group_of(self, rank: int) -> str:
        return f"{self._name}-{rank}"


def _join_all(target: UpdateTarget, joins: Sequence[JoinGroup]) -> None:
    for join in joins:
        try_send(target, LeaveGroup(name=join.name))
        target.send(join)
