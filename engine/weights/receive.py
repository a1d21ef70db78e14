"""Tensors by broadcast from a trainer's group into the open update.

While one broadcast is taken in, the next ones are in flight. A shadow is received where it will
stay: no byte is copied before the commit. In-place updates, and tensors that come in pieces,
pass through two staging buffers in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import GroupError, SlipstreamError
from engine.protocol import Bucket, ReceiveBroadcast
from engine.protocol.deadlines import capped
from engine.transfer import wait_for
from engine.weights import layouts
from engine.weights.group import Group
from engine.weights.groups import Groups
from engine.weights.helpers import nothing
from engine.weights.lane import Look
from engine.weights.session import UpdateSession
from engine.weights.staging import is_whole

_STAGING_BUFFERS = 2
_SHADOW_IN_FLIGHT = 8


def receive_broadcast(
    session: UpdateSession, groups: Groups, command: ReceiveBroadcast, look: Look = nothing
) -> None:
    """Run one `ReceiveBroadcast`. look: called while it waits; what it raises ends it.

    Raises ManifestMismatch or GroupError, before anything moved, for tensors that may not come
    and a group that is not there. Raises UpdateTimeout or GroupError, naming the first tensor
    that did not come, for a sender that is late or gone: the update is over then, and so is the
    group, which can be joined anew.
    """
    buckets: list[Bucket] = []
    refusal: SlipstreamError | None = None
    try:
        look()
        session.require_owned("receive", command.owner)
        session.expect(command.tensors)
        buckets = layouts.broadcasts(command)
        _check_source(groups, command)
    except SlipstreamError as error:
        refusal = error
    with session.receiving(command.tensors, refusal):
        memory: list[torch.Tensor] = []
        done = False
        try:
            group = groups.get(command.group)
            group.look = look
            groups.lend(command.group, memory)
            _transfer(session, group, command, buckets, memory)
            group.look = nothing
            groups.lend(command.group, ())
            done = True
        finally:
            if not done:
                # Before the memory goes that broadcasts still write to.
                groups.leave(command.group)


def _check_source(groups: Groups, command: ReceiveBroadcast) -> None:
    world_size = groups.world_size(command.group)
    if not 0 <= command.source < world_size:
        raise GroupError(
            f"group {command.group!r} has ranks 0 to {world_size - 1}, not {command.source}",
            field="source",
        )
    if command.source in groups.own_ranks(command.group):
        raise GroupError(
            f"rank {command.source} of group {command.group!r} is a rank of this engine, which "
            "receives; name the trainer's rank that sends",
            field="source",
        )


def _transfer(
    session: UpdateSession,
    group: Group,
    command: ReceiveBroadcast,
    buckets: Sequence[Bucket],
    memory: list[torch.Tensor],
) -> None:
    """memory: filled with what broadcasts may be writing to, as long as they may."""
    deadline = session.deadline(capped(command.timeout_s))
    lasting = session.keeps_memory() and all(map(is_whole, command.tensors))
    buffers = _Buffers(group, buckets, lasting=lasting)
    in_flight: deque[tuple[Any, Bucket, torch.Tensor]] = deque()
    for index, bucket in enumerate(buckets):
        if len(in_flight) == buffers.count:
            _take_in(session, group, in_flight.popleft(), deadline, lasting=lasting)
        buffer = buffers.get(index)
        memory[:] = [*(waiting for _, _, waiting in in_flight), buffer]
        ticket = group.broadcast(buffer, command.source, deadline, _first_name(bucket))
        in_flight.append((ticket, bucket, buffer))
    while in_flight:
        _take_in(session, group, in_flight.popleft(), deadline, lasting=lasting)
    if not lasting:
        buffers.release()


def _take_in(
    session: UpdateSession,
    group: Group,
    arrival: tuple[Any, Bucket, torch.Tensor],
    deadline: float,
    *,
    lasting: bool,
) -> None:
    ticket, bucket, buffer = arrival
    group.wait(ticket, deadline)
    pieces = ((placed.piece, layouts.elements(buffer, placed)) for placed in bucket.placements)
    session.feed(pieces, lasting=lasting)


class _Buffers:
    """Where broadcasts arrive: each in memory of its own that lasts, or a few in turn."""

    def __init__(self, group: Group, buckets: Sequence[Bucket], *, lasting: bool) -> None:
        self._group = group
        self._sizes = [bucket.num_bytes for bucket in buckets]
        self._lasting = lasting
        self.count = _SHADOW_IN_FLIGHT if lasting else _STAGING_BUFFERS
        largest = max(self._sizes, default=0)
        self._staging = [] if lasting else [group.empty(largest) for _ in range(self.count)]

    def get(self, index: int) -> torch.Tensor:
        """uint8 memory of the size of broadcast `index`."""
        size = self._sizes[index]
        if self._lasting:
            return self._group.empty(size)
        return self._staging[index % self.count][:size]

    def release(self) -> None:
        """Wait for the copies out of the staging buffers, so that their memory can go back."""
        if self._staging:
            wait_for(self._staging[0].device)
        self._staging = []


def _first_name(bucket: Bucket) -> str:
    return bucket.placements[0].piece.name if bucket.placements else "an empty broadcast"
