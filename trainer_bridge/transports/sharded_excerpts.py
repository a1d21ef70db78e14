"""Every trainer rank at once sends every engine rank what that one reads, and nothing else.

One group of all ranks of the trainer and of the engines, which trainer rank 0 hosts. A plan is
computed on both sides from the same facts (`engine.protocol.excerpts`) and kept: an update is one
small command an engine, and the tensors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import GroupError
from engine.protocol import (
    BeginUpdate,
    JoinGroup,
    LeaveGroup,
    PlanExcerpts,
    RankExcerpts,
    ReceiveExcerpts,
    TensorPiece,
    TensorSpec,
)
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.excerpt_plan import SendStage, needs_whole, plan_command, plan_sends
from trainer_bridge.excerpt_sender import ExcerptSender
from trainer_bridge.fleet import Member, on_each
from trainer_bridge.process_group import SenderGroup
from trainer_bridge.transports.nccl import check, complete, join_commands
from trainer_bridge.transports.sharded_ways import (
    Settings,
    Trainers,
    are_members,
    leave_all,
    stopping,
)
from trainer_bridge.update_target import try_send


class ExcerptWay:
    """See `Way`."""

    def __init__(self, settings: Settings, trainers: Trainers) -> None:
        self._settings = settings
        self._trainers = trainers
        self._sender: ExcerptSender | None = None
        self._joined: list[str] = []
        self._planned: tuple[Sequence[TensorSpec], bool] | None = None
        self._pieces: list[TensorPiece] = []
        self._stages: list[SendStage] = []

    def is_ready(self, begin: BeginUpdate, members: Sequence[Member]) -> bool:
        """See `Way`."""
        return self._is_joined(members) and self._is_planned(begin)

    def form(self, begin: BeginUpdate, members: Sequence[Member], source: WeightSource) -> None:
        """See `Way`."""
        agree = self._trainers.agree
        if not all(agree(self._is_joined, members)):
            sizes = agree(lambda: [member.state.num_ranks for member in members])[0]
            place = agree(self._listen, sizes)[0]
            agree(self._complete, place, sizes, members)
            self._joined = [member.name for member in members]
        self._planned = None
        pieces = agree(lambda: [piece for piece, _ in source.shards()])
        command = plan_command(
            self._settings.name,
            begin,
            pieces,
            bucket_bytes=self._settings.bucket_bytes,
            timeout_s=self._settings.timeout_s,
        )
        needs = agree(self._ask, command, members)[0]
        self._pieces = pieces[self._trainers.rank]
        agree(self._plan, command, needs)
        self._planned = ([*begin.manifest], needs_whole(begin))

    def carry(self, begin: BeginUpdate, members: Sequence[Member], source: WeightSource) -> None:
        """See `Way`."""
        assert self._sender is not None, "carry before form"
        group = self._sender.group
        timeout_s = self._settings.timeout_s
        command = ReceiveExcerpts(group=group.name, timeout_s=timeout_s, owner=begin.owner)

        def check_all() -> None:
            check(received)
            group.check_stopped()

        with (
            stopping(lambda: self._stop_others(members)),
            ThreadPoolExecutor(max(len(members), 1)) as pool,
        ):
            received = [pool.submit(member.send, command) for member in members]
            self._sender.send(
                self._stages,
                self._pieces,
                source.shards(),
                deadline=time.monotonic() + timeout_s,
                check=check_all,
            )
            while not all(future.done() for future in received):
                check_all()
                time.sleep(_POLL_S)
            check(received, wait=True)

    def group_names(self) -> list[str]:
        """See `Way`."""
        return [self._settings.name]

    def drop(self) -> None:
        """See `Way`."""
        sender, self._sender = self._sender, None
        self._planned = None
        if sender is not None:
            sender.group.close()

    def _is_joined(self, members: Sequence[Member]) -> bool:
        connected = self._sender is not None and self._sender.group.is_open
        if self._trainers.rank:
            return connected
        return connected and are_members(members, self._joined, self.group_names())

    def _is_planned(self, begin: BeginUpdate) -> bool:
        planned = self._planned
        if planned is None or planned[1] != needs_whole(begin):
            return False
        # Only the sums of what is sent may be others.
        return len(planned[0]) == len(begin.manifest) and all(
            (one.name, one.dtype, one.shape) == (other.name, other.dtype, other.shape)
            for one, other in zip(planned[0], begin.manifest, strict=True)
        )

    def _listen(self, sizes: Sequence[int]) -> tuple[str, int]:
        """Rank 0 opens the group; where the others meet it."""
        self.drop()
        if self._trainers.rank:
            return "", 0
        group = self._group(sizes, self._settings.address, 0)
        self._sender = ExcerptSender(group, self._settings.device)
        return group.address, group.port

    def _group(self, sizes: Sequence[int], address: str, port: int) -> SenderGroup:
        settings, trainers = self._settings, self._trainers
        return SenderGroup(
            settings.name,
            world_size=trainers.size + sum(sizes),
            backend=settings.backend,
            address=address,
            port=port,
            timeout_s=settings.timeout_s,
            rank=trainers.rank,
            senders=trainers.size,
            own_address=settings.address,
        )

    def _complete(
        self, place: tuple[str, int], sizes: Sequence[int], members: Sequence[Member]
    ) -> None:
        if self._trainers.rank:
            group = self._group(sizes, *place)
            self._sender = ExcerptSender(group, self._settings.device)
            group.connect()
            return
        assert self._sender is not None, "complete before listen"
        group = self._sender.group
        joins = join_commands(group, sizes)
        with (
            stopping(lambda: self._stop_others(members)),
            ThreadPoolExecutor(len(members)) as pool,
        ):
            joined = [
                pool.submit(_join, member, command)
                for member, command in zip(members, joins, strict=True)
            ]
            complete(group, joined, sizes)
            check(joined, wait=True)

    def _ask(self, command: PlanExcerpts, members: Sequence[Member]) -> list[RankExcerpts]:
        """What every engine rank takes, in the order of the group's ranks."""
        replies = on_each(members, lambda member: member.send(command))
        found = [excerpts for reply in replies for excerpts in reply.excerpts]
        expected = sum(member.state.num_ranks for member in members)
        if len(found) != expected:
            raise GroupError(
                f"{len(found)} of {expected} engine ranks said what they take", field="excerpts"
            )
        return found

    def _plan(self, command: PlanExcerpts, needs: Sequence[RankExcerpts]) -> None:
        self._stages = plan_sends(command, self._trainers.rank, needs)

    def _stop_others(self, members: Sequence[Member]) -> None:
        """When rank 0 fails, the others would wait for engines that come no more."""
        if self._trainers.rank or self._sender is None:
            return
        self._sender.group.stop("trainer rank 0 failed")
        leave_all([member.target for member in members], self.group_names())


_POLL_S = 0.0005


def _join(member: Member, command: JoinGroup) -> Any:
    try_send(member.target, LeaveGroup(name=command.name))
    return member.send(command)
