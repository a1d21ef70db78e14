"""What every transport does: carry the tensors of one open update to the engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

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
from trainer_bridge.update_target import UpdateTarget


class Carrier(ABC):
    """A connection to some engines, made at the first update and kept."""

    targets: Sequence[UpdateTarget]

    @cached_property
    def owner(self) -> str:
        """Of the updates that this carrier begins; see `BeginUpdate.owner`."""
        return draw_owner()

    def announce(
        self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]
    ) -> BeginUpdate:
        """The update to announce: `begin` itself, unless a transport sends only a part."""
        return begin

    @abstractmethod
    def carry(self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]) -> None:
        """Bring every tensor of the manifest to every member, whose update is open.

        members: all targets, or those that an earlier push of this version did not reach.
        """

    def settle(self, begin: BeginUpdate) -> None:
        """The update ended, however it did: free what it alone needed. Called once for every
        update that was announced, after the last engine answered."""
        return

    def committed(self, begin: BeginUpdate, members: Sequence[Member]) -> None:
        """Every target serves `begin.version` now; `members` took it in this update. For a
        transport that sends only a part of the next one: see `trainer_bridge.delta_base`."""
        return

    @abstractmethod
    def close(self) -> None:
        """Leave the engines. Idempotent."""


def publish(carrier: Carrier, begin: BeginUpdate, source: WeightSource) -> UpdateReport:
    """One transaction over all targets of the carrier; returns the first engine's report.

    Begin on every engine, carry, have every engine verify, commit on every engine. Whatever
    fails before the first commit aborts the update on all of them, and the error is raised on,
    naming the engine: they serve the old version. Raises FleetDivided when only a part of them
    committed; publishing the same version again then reaches those left behind, if the
    source still has the same weights.
    """
    begin = owned(begin, carrier.owner)
    taking, holding = divide(carrier.targets, begin.version)
    begin = carrier.announce(begin, source, taking)
    try:
        _bring(carrier, begin, source, taking)
        report = commit(taking, holding, begin)
    finally:
        carrier.settle(begin)
    carrier.committed(begin, taking)
    return report


def _bring(
    carrier: Carrier, begin: BeginUpdate, source: WeightSource, taking: Sequence[Member]
) -> None:
    """Everything before the first commit; a failure aborts the update on every engine."""
    prepared = False
    try:
        on_each(taking, lambda member: member.send(begin))
        carrier.carry(begin, source, taking)
        prepare(taking, begin)
        prepared = True
    finally:
        if not prepared:
            give_up(taking, begin)
