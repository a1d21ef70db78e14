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


@dataclass(frozen=True)
class _Ticket:
    work: Any
    source: int
    tensor: str


class GlooGroup:
    """This rank's end of a gloo group, built beside torch's own registry of groups.

    `torch.distributed` names each group of a process once and ties it to a default group; the
    backend itself needs neither, only the store keys that torch would use.
    """

    def __init__(self, store: Store, command: JoinGroup, rank: int, deadline: float) -> None:
        self.name = command.name
        self._store = store
        keys = PrefixStore(command.name, store)
        rendezvous.announce_and_await(keys, command, rank, deadline)
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
        # The group cannot be destroyed before its operations ended: none may outlive the wait.
        options.timeout = timedelta(seconds=seconds_left(deadline))
        try:
            return _Ticket(self._group.broadcast([buffer], options), source, tensor)
        except RuntimeError as error:
            raise self._broken(source, tensor, deadline, error) from error

    def wait(self, ticket: _Ticket, deadline: float) -> None:
        """See `Group`."""
        try:
            ticket.work.wait(timedelta(seconds=seconds_left(deadline)))
        except RuntimeError as error:
            raise self._broken(ticket.source, ticket.tensor, deadline, error) from error

    def is_alive(self) -> bool:
        """See `Group`."""
        return self._group is not None and rendezvous.answers(self._store)

    def abort(self) -> bool:
        """See `Group`."""
        self._group = None
        return True

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
