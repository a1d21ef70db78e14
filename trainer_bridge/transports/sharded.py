"""Weights from every trainer rank at once: each sends the pieces that it holds.

Called collectively: every trainer rank builds a `ShardedCarrier` and calls `publish` on it.
Trainer rank 0 speaks with the engines; the others only send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from engine.protocol import BeginUpdate, UpdateReport
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
from trainer_bridge.transports.nccl import BUCKET_BYTES
from trainer_bridge.transports.sharded_broadcasts import BroadcastWay
from trainer_bridge.transports.sharded_excerpts import ExcerptWay
from trainer_bridge.transports.sharded_ways import Settings, Trainers, Way, leave_all
from trainer_bridge.update_target import UpdateTarget

WayName = Literal["auto", "excerpts", "broadcasts"]


class ShardedCarrier:
    """One trainer rank's part of a sharded update.

    targets: the engines, on trainer rank 0; empty elsewhere. trainer_group: a gloo group of
    all trainer ranks (None takes the default group), for small Python objects only.
    address: under which the engines, and the other trainer ranks, reach this rank. way: how the
    shards travel. By excerpts each engine rank gets only what it reads, from all trainer ranks at
    once; by broadcasts every engine rank gets everything, from one trainer rank after the other,
    and a trainer rank sends its shards once, however many engines there are. auto takes excerpts
    unless the engines have more copies of the model than there are trainer ranks.
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
        way: WayName = "auto",
    ) -> None:
        self.targets = targets
        self._trainers = Trainers(trainer_group)
        self._settings = Settings(
            device=device,
            address=address,
            name=name,
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
        )
        self._owner = draw_owner()
        self._choice = way
        self._way: ExcerptWay | BroadcastWay | None = None
        self._taking: list[Member] = []
        self._holding: list[Member] = []

    def publish(self, begin: BeginUpdate, source: WeightSource) -> UpdateReport:
        """One transaction in two phases, collective over the trainer ranks; see
        `transports.base.publish`.

        begin: equal on all ranks but for the owner, of which rank 0's counts. Every rank gets
        the report, or an error: its own, or a GroupError that quotes the rank that failed.
        """
        begin = owned(begin, self._owner)
        agree = self._trainers.agree
        prepared = False
        try:
            begun = agree(self._begin, begin)
            way = self._way_for(begun[0][0])
            if not all(is_ready for _, is_ready in begun):
                way.form(begin, self._taking, source)
            agree(self._carry, way, begin, source)
            prepared = True
        finally:
            if not prepared:
                give_up(self._taking, begin)
        report: UpdateReport = agree(self._commit, begin)[0]
        return report

    def close(self) -> None:
        """Leave the engines. Idempotent."""
        if self._way is not None:
            leave_all(self.targets, self._way.group_names())
            self._way.drop()
            self._way = None

    def _begin(self, begin: BeginUpdate) -> tuple[int, bool]:
        """Open the update; how many copies of the model take it, which rank 0 knows of, and whether
        this rank can carry it as it is."""
        self._taking = []
        if not self.targets:
            return 0, self._way is not None and self._way.is_ready(begin, [])
        taking, self._holding = divide(self.targets, begin.version)
        # Known before any of them may fail: whoever began gives up.
        self._taking = taking
        on_each(taking, lambda member: member.send(begin))
        num_copies = sum(member.state.dp_size for member in taking)
        way = self._way
        is_same = way is not None and isinstance(way, self._kind_for(num_copies))
        return num_copies, way is not None and is_same and way.is_ready(begin, taking)

    def _carry(self, way: Way, begin: BeginUpdate, source: WeightSource) -> None:
        """The tensors, and on rank 0 the first phase: an engine that is through with it has got
        them from every trainer rank."""
        way.carry(begin, self._taking, source)
        prepare(self._taking, begin)

    def _kind_for(self, num_copies: int) -> type[ExcerptWay | BroadcastWay]:
        by_excerpts = self._choice == "excerpts" or (
            self._choice == "auto" and num_copies <= self._trainers.size
        )
        return ExcerptWay if by_excerpts else BroadcastWay

    def _way_for(self, num_copies: int) -> ExcerptWay | BroadcastWay:
        """The same on every rank."""
        kind = self._kind_for(num_copies)
        if not isinstance(self._way, kind):
            self.close()
            self._way = kind(self._settings, self._trainers)
        return self._way

    def _commit(self, begin: BeginUpdate) -> UpdateReport | None:
        if not self.targets:
            return None
        return commit(self._taking, self._holding, begin)
