"""A group on CPU memory: gloo, for engines and trainers without NCCL, and for tests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.comm.rendezvous import backend_prefix
from engine.errors import GroupError, WeightUpdateError
from engine.protocol import JoinGroup
from engine.weights import trainer_store
from engine.weights.group import broken, seconds_left
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look
from kernels.torch_compat import PrefixStore, Store

_MARK = 0xFF
"""Two bytes of it are NaN in every float dtype of two bytes or more, and one is in those of one."""
_LAST_BYTES = 2
_BEHIND_BYTES = 16
_ROOM_BYTES = 64 << 10
_POLL_S = 0.00005
_LONGEST_POLL_S = 0.002


@dataclass(eq=False)
class _Ticket:
    """work: None once the group was dropped. It holds the connection, and whoever caught the error
    of a transfer holds its frames, tickets included."""

    work: Any
    source: int
    tensor: str
    buffer: torch.Tensor
    behind: torch.Tensor


class GlooGroup:
    """This rank's end of a gloo group, built beside torch's own registry of groups.

    `torch.distributed` names each group of a process once and ties it to a default group; the
    backend itself needs neither, only the store keys that torch would use.
    """

    lands = False

    def __init__(
        self,
        command: JoinGroup,
        rank: int,
        backend: Any,
        *,
        store: Store,
        look: Look = nothing,
        helpers: Helpers | None = None,
        sender: int = 0,
        world_size: int = 0,
    ) -> None:
        """backend: what `connect` returns. sender: the rank of the whole group that is rank 0 of
        this one, where it is of two ranks alone. world_size: that of the command if 0."""
        self.name = command.name
        self.look = look
        self._store = store
        self._rank = rank
        self._world_size = world_size or command.world_size
        self._sender = sender
        self._helpers = helpers or Helpers()
        self._queued: list[_Ticket] = []
        self._group = backend

    @classmethod
    def meet(
        cls,
        store: Store,
        command: JoinGroup,
        rank: int,
        deadline: float,
        look: Look = nothing,
        helpers: Helpers | None = None,
    ) -> GlooGroup:
        """This rank's end, once every rank came."""
        keys = PrefixStore(command.name, store)
        trainer_store.announce_and_await(keys, command, rank, deadline, look)
        backend_keys = PrefixStore(backend_prefix(command.name, "cpu"), keys)
        backend = connect(backend_keys, command, rank, command.world_size, deadline)
        return cls(command, rank, backend, store=store, look=look, helpers=helpers)

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See `Group`. There is room behind it, which costs no memory until something comes
        there: gloo ends the process for a message that is larger than what it may fill, as from
        a trainer that announces bfloat16 and sends float32. Its size comes with the message
        itself, to gloo alone, so it cannot be looked at before."""
        return torch.empty(2 * num_bytes + _ROOM_BYTES, dtype=torch.uint8)[:num_bytes]

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> _Ticket:
        """See `Group`."""
        options = dist.BroadcastOptions()
        options.rootRank = source
        # The group cannot be destroyed before its operations ended: none may outlive this.
        options.timeout = timedelta(seconds=seconds_left(deadline))
        room = buffer if self._passes_on(source) else _with_room(buffer)
        behind = room[buffer.numel() :][:_BEHIND_BYTES]
        buffer[-_LAST_BYTES:] = behind[:] = _MARK
        try:
            work = self._group.broadcast([room], options)
        except RuntimeError as error:
            raise self._broken(source, tensor, deadline, error) from error
        ticket = _Ticket(work, source, tensor, buffer, behind)
        self._queued = [other for other in self._queued if other.work is not None] + [ticket]
        return ticket

    def receive(
        self, messages: Sequence[tuple[torch.Tensor, int]], deadline: float, tensor: str
    ) -> Any:
        """See `Group`: `GlooPairs` does."""
        raise GroupError(
            f"group {self.name!r} was formed for broadcasts; form it with `senders`", field="group"
        )

    def wait(self, ticket: _Ticket, deadline: float) -> None:
        """See `Group`."""
        pause_s = _POLL_S
        while (
            ticket.work is not None
            and not ticket.work.is_completed()
            and time.monotonic() < deadline
        ):
            self.look()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        self.finish(ticket, deadline)

    def finish(self, ticket: _Ticket, deadline: float) -> None:
        """What `wait` does once a broadcast is done, or its time is up."""
        work = ticket.work
        if work is None:
            raise GroupError(f"group {self.name!r} was dropped", field=ticket.tensor)
        try:
            work.wait(timedelta(seconds=seconds_left(deadline)))
        except RuntimeError as error:
            # The frames of an error keep nothing of the group.
            del work
            raise self._broken(ticket.source, ticket.tensor, deadline, error) from error
        self._require_size(ticket)
        ticket.work = None

    def is_alive(self) -> bool:
        """See `Group`."""
        return self._group is not None and trainer_store.answers(self._store, self._helpers)

    def abort(self) -> bool:
        """See `Group`. Gloo ends no operation before its time, and its group waits for them: one
        that has some left is kept until they ended."""
        if all(ticket.work is None or ticket.work.is_completed() for ticket in self._queued):
            for ticket in self._queued:
                ticket.work = None
            self._queued.clear()
            self._group = None
        return not self._queued

    def _passes_on(self, source: int) -> bool:
        """Whether this rank sends what it gets to others: gloo's broadcast goes down a binomial
        tree (gloo/broadcast.cc), and would pass on all that there is room for."""
        place = (self._rank - source) % self._world_size
        return place + (1 << place.bit_length()) < self._world_size

    def _require_size(self, ticket: _Ticket) -> None:
        """Gloo says nothing of a message that is smaller than what it may fill. The last bytes
        are marked before it comes, with what no weight that can be served ends in, and those
        behind them."""
        last = ticket.buffer[-_LAST_BYTES:]
        if last.numel() and bool((last == _MARK).all()):
            raise self._odd_size(ticket, "fewer", ", or a tensor that ends in NaN")
        if not bool((ticket.behind == _MARK).all()):
            raise self._odd_size(ticket, "more", "")

    def _odd_size(self, ticket: _Ticket, which: str, instead: str) -> GroupError:
        return GroupError(
            f"rank {ticket.source + self._sender} of group {self.name!r} sent {which} bytes than "
            f"the {ticket.buffer.numel()} announced, from {ticket.tensor} on{instead}: announce "
            "the dtype and shape that are sent, in their order",
            field=ticket.tensor,
        )

    def _broken(
        self, source: int, tensor: str, deadline: float, error: RuntimeError
    ) -> WeightUpdateError:
        late = time.monotonic() >= deadline - 0.01
        return broken(self.name, source + self._sender, tensor, error, late=late)


def connect(keys: Store, command: JoinGroup, rank: int, size: int, deadline: float) -> Any:
    """One gloo group of `size` ranks that meet behind `keys`. Raises GroupError if one does not
    come."""
    timeout = timedelta(seconds=seconds_left(deadline))
    try:
        return dist.ProcessGroupGloo(keys, rank, size, timeout)
    except RuntimeError as error:
        if time.monotonic() < deadline:
            raise trainer_store.store_lost(command, error) from error
        raise trainer_store.absent_error(command, [0]) from error


def _with_room(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer and what lies behind it in its memory."""
    end = buffer.untyped_storage().nbytes()
    start = buffer.storage_offset()
    return buffer.as_strided((end - start,), (1,), start)
