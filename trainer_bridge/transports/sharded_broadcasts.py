"""Every trainer rank in turn broadcasts its shards to all engine ranks.

Each hosts a group of its own with all engine ranks, so that no tensor passes through another
trainer rank. What one sends is sent once however many engines take it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.protocol import BeginUpdate, JoinGroup, LeaveGroup, ReceiveBroadcast, TensorPiece
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.fleet import Member
from trainer_bridge.process_group import SenderGroup, stop
from trainer_bridge.transports.nccl import Broadcaster, check, complete, join_commands
from trainer_bridge.transports.sharded_ways import (
    Settings,
    Trainers,
    are_members,
    leave_all,
    stopping,
)
from trainer_bridge.update_target import try_send


class BroadcastWay:
    """See `Way`."""

    def __init__(self, settings: Settings, trainers: Trainers) -> None:
        self._settings = settings
        self._trainers = trainers
        self._sender: Broadcaster | None = None
        self._pieces: list[list[TensorPiece]] = []
        self._joined: list[str] = []
        self._hosts: list[tuple[str, int]] = []

    def is_ready(self, begin: BeginUpdate, members: Sequence[Member]) -> bool:
        """See `Way`."""
        connected = self._sender is not None and self._sender.group.is_open
        if self._trainers.rank:
            return connected
        return connected and are_members(members, self._joined, self.group_names())

    def form(self, begin: BeginUpdate, members: Sequence[Member], source: WeightSource) -> None:
        """See `Way`. Every rank listens, rank 0 has the engines join all groups, every rank
        completes."""
        agree = self._trainers.agree
        sizes = agree(lambda: [member.state.num_ranks for member in members])[0]
        joins = agree(self._listen, sizes)
        self._hosts = [(commands[0].address, commands[0].port) for commands in joins]
        agree(self._complete, joins, members)
        self._joined = [member.name for member in members]
        # Fixed by the trainer's layout, so asked for with the connection.
        self._pieces = agree(lambda: [piece for piece, _ in source.shards()])

    def carry(self, begin: BeginUpdate, members: Sequence[Member], source: WeightSource) -> None:
        """See `Way`."""
        assert self._sender is not None, "carry before form"
        group = self._sender.group
        deadline = time.monotonic() + self._settings.timeout_s
        pieces = self._pieces[self._trainers.rank]
        flats = (flat for _, flat in source.shards())

        def check_all() -> None:
            check(received)
            group.check_stopped()

        with (
            stopping(lambda: self._stop_others(members)),
            ThreadPoolExecutor(max(len(members), 1)) as pool,
        ):
            received = [pool.submit(self._receive_all, m, begin.owner) for m in members]
            self._sender.send(pieces, flats, deadline=deadline, check=check_all)
            check(received, wait=True)

    def group_names(self) -> list[str]:
        """See `Way`."""
        return [self._group_of(rank) for rank in range(len(self._hosts))]

    def drop(self) -> None:
        """See `Way`."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.group.close()

    def _listen(self, sizes: list[int]) -> list[JoinGroup]:
        """Open this rank's group; returns what each engine is to do to join it."""
        self.drop()
        settings = self._settings
        group = SenderGroup(
            self._group_of(self._trainers.rank),
            world_size=1 + sum(sizes),
            backend=settings.backend,
            address=settings.address,
            timeout_s=settings.timeout_s,
        )
        self._sender = Broadcaster(group, settings.device, bucket_bytes=settings.bucket_bytes)
        return join_commands(group, sizes)

    def _complete(self, joins: list[list[JoinGroup]], members: Sequence[Member]) -> None:
        assert self._sender is not None, "complete before listen"
        with (
            stopping(lambda: self._stop_others(members)),
            ThreadPoolExecutor(max(len(members), 1)) as pool,
        ):
            joined = [
                pool.submit(_join_all, member, [commands[index] for commands in joins])
                for index, member in enumerate(members)
            ]
            complete(self._sender.group, joined, [m.state.num_ranks for m in members])
            check(joined, wait=True)

    def _stop_others(self, members: Sequence[Member]) -> None:
        """When rank 0 fails, the others would wait for engines that come no more."""
        if self._trainers.rank:
            return
        for rank, (address, port) in enumerate(self._hosts):
            if rank:
                stop(self._group_of(rank), address, port, "trainer rank 0 failed")
        # A broadcast under way ends when the engines leave.
        leave_all([member.target for member in members], self.group_names())

    def _receive_all(self, member: Member, owner: str) -> None:
        """Have one engine receive from every trainer rank in turn."""
        for rank, pieces in enumerate(self._pieces):
            member.send(
                ReceiveBroadcast(
                    group=self._group_of(rank),
                    tensors=pieces,
                    bucket_bytes=self._settings.bucket_bytes,
                    timeout_s=self._settings.timeout_s,
                    owner=owner,
                )
            )

    def _group_of(self, rank: int) -> str:
        return f"{self._settings.name}-{rank}"


def _join_all(member: Member, joins: Sequence[JoinGroup]) -> None:
    for join in joins:
        try_send(member.target, LeaveGroup(name=join.name))
        member.send(join)
