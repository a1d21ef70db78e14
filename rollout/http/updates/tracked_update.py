"""What the server notes of the update that is open, and whose it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import UpdateOrder
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    LoadFromDisk,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveExcerpts,
    ReceiveIpc,
)
from rollout.replica.command_replies import command_name

Feed = ReceiveBroadcast | ReceiveExcerpts | ReceiveIpc | LoadFromDisk
UpdateCommand = (
    BeginUpdate
    | ReceiveBroadcast
    | ReceiveExcerpts
    | ReceiveIpc
    | LoadFromDisk
    | PrepareUpdate
    | CommitUpdate
    | AbortUpdate
)

_MOST_HELD_S = 600.0
"""After which the router that had an update verified is taken for gone."""
EndingCall = Literal["flush", "pause"]
"""A call that commits an implicit update if that is whole: a flush of the cache, which else leaves
it open; a pause or the begin of another one, which else drop it."""


@dataclass(frozen=True)
class Gathered:
    """An implicit update, verified. missing: why it is not whole; "" if it is."""

    version: int
    missing: str = ""


@dataclass(kw_only=True)
class TrackedUpdate:
    """The update between its begin and its commit.

    explicit: its caller commits it. failed: its last command failed, so that whoever wants to
    begin another may drop it. owner: what its commands name. origin: how the first tensors of an
    implicit one came. foreign: its caller speaks the protocol itself, and owns it if it said so.
    held: it was verified where it would have been committed, and waits for a router's word.
    """

    version: int
    explicit: bool
    partial: bool
    label: str | None = None
    num_feeds: int = 0
    failed: bool = False
    owner: str = ""
    origin: tuple[str, ...] = ()
    foreign: bool = False
    held: bool = False
    held_at: float = 0.0
    began_at: float = field(default_factory=time.monotonic)

    @property
    def waits(self) -> bool:
        """Whether a router that had it verified may still say what becomes of it."""
        return self.held and time.monotonic() - self.held_at < _MOST_HELD_S


def origin_of(command: Feed, peer: str) -> tuple[str, ...]:
    """How tensors came: the carrier, its group, the caller's host. A trainer of several pipeline
    stages has a group a stage, whose names differ in their number only."""
    kind = command_name(command)
    if isinstance(command, ReceiveBroadcast | ReceiveExcerpts):
        return kind, command.group.rstrip("0123456789"), peer
    return kind, peer


def require_ours(update: TrackedUpdate) -> None:
    """Raise UpdateOrder for a caller that names no owner, where the update has one."""
    if update.foreign and update.owner:
        raise UpdateOrder(
            f"update {update.version} is open, and belongs to the owner that began it by "
            "/command; wait for its end",
            field="update",
        )


def begun_again(update: TrackedUpdate) -> int:
    """The version of an update that is begun again. Raises UpdateOrder once tensors came."""
    require_ours(update)
    if update.num_feeds:
        raise UpdateOrder(
            f"update {update.version} is open and has received tensors; end it first",
            field="update",
        )
    return update.version
