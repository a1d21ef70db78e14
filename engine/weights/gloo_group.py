"""A group on CPU memory: gloo, for engines and trainers without NCCL, and for tests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from engine.errors import GroupError, UpdateTimeout, WeightUpdateError
from engine.protocol import JoinGroup
from engine.protocol.rendezvous import backend_prefix
from engine.weights import rendezvous
from engine.weights.group import seconds_left
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look

_MARK_BYTES = 2
_MARK = 0xFF
"""Two bytes of it are NaN in every float dtype of two bytes or more, and one is in those of one."""
_POLL_S = 0.00005
_LONGEST_POLL_S = 0.002


@dataclass(frozen=True)
class _Ticket:
    work: Any
    source: int
    tensor: str
    buffer: torch.Tensor


class GlooGroup:
    """This rank's end of a gloo group, built beside torch's own registry of groups.

    `torch.distributed` names each group of a process once and ties it to a default group; the
    backend itself needs neither, only the store keys that torch would use.
    """

    def __init__(
        self,
        store: Store,
        command: JoinGroup,
        rank: int,
        deadline: float,
        look: Look = nothing,
        helpers: Helpers | None = None,
    ) -> None:
        self.name = command.name
        self.look = look
        self._store = store
        self._helpers = helpers or Helpers()
        self._queued: list[Any] = []
        keys = PrefixStore(command.name, store)
        rendezvous.announce_and_await(keys, command, rank, deadline, look)
        backend_keys = PrefixStore(backend_prefix(command.name, "cpu"), keys)
        timeout = timedelta(seconds=seconds_left(deadline))
        try:
            self._group: Any = dist.ProcessGroupGloo(
                backend_keys, rank, command.world_size, timeout
            )
        except RuntimeError as error:
            if time.monotonic() < deadline:
                raise rendezvous.store_lost(command, error) from error
            raise rendezvous.absent_error(command, [0]) from error

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See `Group`."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> _Ticket:
        """See `Group`."""
        options = dist.BroadcastOptions()
        options.rootRank = source
        # The group cannot be destroyed before its operations ended: none may outlive this.
        options.timeout = timedelta(seconds=seconds_left(deadline))
        buffer[-_MARK_BYTES:] = _MARK
        try:
            work = self._group.broadcast([buffer], options)
        except RuntimeError as error:
            raise self._broken(source, tensor, deadline, error) from error
        self._queued = [other for other in self._queued if not other.is_completed()] + [work]
        return _Ticket(work, source, tensor, buffer)

    def wait(self, ticket: _Ticket, deadline: float) -> None:
        """See `Group`."""
        pause_s = _POLL_S
        while not ticket.work.is_completed() and time.monotonic() < deadline:
            self.look()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        try:
            ticket.work.wait(timedelta(seconds=seconds_left(deadline)))
        except RuntimeError as error:
            raise self._broken(ticket.source, ticket.tensor, deadline, error) from error
        self._require_whole(ticket)

    def is_alive(self) -> bool:
        """See `Group`."""
        return self._group is not None and rendezvous.answers(self._store, self._helpers)

    def abort(self) -> bool:
        """See `Group`. Gloo ends no operation before its time, and its group waits for them: one
        that has some left is kept until they ended."""
        self._queued = [work for work in self._queued if not work.is_completed()]
        if not self._queued:
            self._group = None
        return not self._queued

    def _require_whole(self, ticket: _Ticket) -> None:
        """Gloo takes fewer bytes than it was to receive, and says nothing: the last ones are
        marked before, with what no weight that can be served ends in."""
        last = ticket.buffer[-_MARK_BYTES:]
        if last.numel() and bool((last == _MARK).all()):
            raise GroupError(
                f"rank {ticket.source} of group {self.name!r} sent fewer bytes than the "
                f"{ticket.buffer.numel()} announced, from {ticket.tensor} on, or a tensor that ends "
                "in NaN: announce the dtype and shape that are sent, in their order",
                field=ticket.tensor,
            )

    def _broken(
        self, source: int, tensor: str, deadline: float, error: RuntimeError
    ) -> WeightUpdateError:
        if time.monotonic() >= deadline - 0.01:
            return UpdateTimeout(
                f"{tensor} did not come from rank {source} of group {self.name!r} in time",
                field=tensor,
            )
        return GroupError(
            f"rank {source} of group {self.name!r} is gone; {tensor} did not come ({error})",
            field=tensor,
        )
