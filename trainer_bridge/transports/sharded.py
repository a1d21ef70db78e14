"""Weights by broadcast from every trainer rank at once: each sends the pieces that it holds.

Called collectively: every trainer rank builds a `ShardedCarrier` and calls `publish` on it.
Trainer rank 0 speaks with the engines; the others only send. Each trainer rank hosts a group
of its own with all engine ranks, so that no tensor passes through another trainer rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import GroupError
from engine.protocol import (
    BeginUpdate,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    TensorPiece,
    UpdateReport,
)
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.fleet import (
    Member,
    commit,
    divide,
    draw_owner,
    give_up,
    on_each,
    owned,
    prepare,
)
from trainer_bridge.process_group import Backend, SenderGroup, stop
from trainer_bridge.transports.nccl import BUCKET_BYTES, Broadcaster, check, complete, join_commands
from trainer_bridge.update_target import UpdateTarget, try_send


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
        self._owner = draw_owner()
        self._sender: Broadcaster | None = None
        self._pieces: list[list[TensorPiece]] = []
        self._taking: list[Member] = []
        self._holding: list[Member] = []
        self._joined: list[str] = []
        self._hosts: list[tuple[str, int]] = []

    def publish(self, begin: BeginUpdate, source: WeightSource) -> UpdateReport:
        """One transaction in two phases, collective over the trainer ranks; see
        `transports.base.publish`.

        begin: equal on all ranks but for the owner, of which rank 0's counts. Every rank gets
        the report, or an error: its own, or a GroupError that quotes the rank that failed.
        """
        begin = owned(begin, self._owner)
        prepared = False
        try:
            connected = self._agree(self._begin, begin)
            if not all(connected):
                self._connect(source)
            self._agree(self._carry, source, begin.owner)
            self._agree(lambda: prepare(self._taking, begin))
            prepared = True
        finally:
            if not prepared:
                give_up(self._taking, begin)
        report: UpdateReport = self._agree(self._commit, begin)[0]
        return report

    def close(self) -> None:
        """Leave the engines. Idempotent."""
        if self._sender is not None:
            for target in self.targets:
                self._leave(target)
            self._drop()

    def _agree(self, act: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a stage on every trainer rank; returns all results, or raises on all ranks.

        A stage makes no collective call of its own: one that failed alone would leave the
        others waiting in it.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = act(*args)
        except Exception as error:
            # Whatever it is, the other ranks have to hear of it: they wait for this one.
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
        """Open the update; returns whether this rank still has its group, and the engines, which
        rank 0 knows of, all are members."""
        connected = self._sender is not None and self._sender.group.is_open
        if not self.targets:
            return connected
        self._taking = []
        taking, self._holding = divide(self.targets, begin.version)
        # Known before any of them may fail: whoever began gives up.
        self._taking = taking
        on_each(taking, lambda member: member.send(begin))
        return connected and self._are_members(taking)

    def _are_members(self, taking: Sequence[Member]) -> bool:
        """Whether the groups have these engines in them, none of which was started again."""
        groups = {self._group_of(rank) for rank in range(len(self._pieces))}
        same = [member.name for member in taking] == self._joined
        return same and all(groups <= set(member.state.groups) for member in taking)

    def _connect(self, source: WeightSource) -> None:
        """Every rank listens, rank 0 has the engines join all groups, every rank completes."""
        sizes = self._agree(lambda: [member.state.num_ranks for member in self._taking])[0]
        joins = self._agree(self._listen, sizes)
        self._hosts = [(commands[0].address, commands[0].port) for commands in joins]
        self._agree(self._complete, joins)
        self._joined = [member.name for member in self._taking]
        # Fixed by the trainer's layout, so asked for with the connection.
        self._pieces = self._agree(lambda: [piece for piece, _ in source.shards()])

    def _listen(self, sizes: list[int]) -> list[JoinGroup]:
        """Open this rank's group; returns what each engine is to do to join it."""
        self._drop()
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
        with self._others_stop(), ThreadPoolExecutor(max(len(self._taking), 1)) as pool:
            joined = [
                pool.submit(_join_all, member, [commands[index] for commands in joins])
                for index, member in enumerate(self._taking)
            ]
            complete(self._sender.group, joined, [m.state.num_ranks for m in self._taking])
            check(joined, wait=True)

    def _carry(self, source: WeightSource, owner: str) -> None:
        assert self._sender is not None, "carry before connect"
        group = self._sender.group
        deadline = time.monotonic() + self._timeout_s
        pieces = self._pieces[self._rank]
        flats = (flat for _, flat in source.shards())

        def check_all() -> None:
            check(received)
            group.check_stopped()

        with self._others_stop(), ThreadPoolExecutor(max(len(self._taking), 1)) as pool:
            received = [pool.submit(self._receive_all, member, owner) for member in self._taking]
            self._sender.send(pieces, flats, deadline=deadline, check=check_all)
            check(received, wait=True)

    @contextmanager
    def _others_stop(self) -> Iterator[None]:
        """On rank 0, around a stage that all ranks are in: when it fails here, the others would
        wait for engines that come no more, so they are told."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done and self._rank == 0:
                self._stop_others()

    def _stop_others(self) -> None:
        for rank, (address, port) in enumerate(self._hosts):
            if rank != self._rank:
                stop(self._group_of(rank), address, port, "trainer rank 0 failed")
        # A broadcast under way ends when the engines leave.
        on_each(self._taking, lambda member: self._leave(member.target))

    def _leave(self, target: UpdateTarget) -> None:
        for rank in range(len(self._hosts)):
            try_send(target, LeaveGroup(name=self._group_of(rank)))

    def _receive_all(self, member: Member, owner: str) -> None:
        """Have one engine receive from every trainer rank in turn."""
        for rank, pieces in enumerate(self._pieces):
            member.send(
                ReceiveBroadcast(
                    group=self._group_of(rank),
                    tensors=pieces,
                    bucket_bytes=self._bucket_bytes,
                    timeout_s=self._timeout_s,
                    owner=owner,
                )
            )

    def _commit(self, begin: BeginUpdate) -> UpdateReport | None:
        if not self.targets:
            return None
        return commit(self._taking, self._holding, begin)

    def _drop(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.group.close()

    def _group_of(self, rank: int) -> str:
        return f"{self._name}-{rank}"


def _join_all(member: Member, joins: Sequence[JoinGroup]) -> None:
    for join in joins:
        try_send(member.target, LeaveGroup(name=join.name))
        member.send(join)
