"""A group on CPU memory in which every trainer rank sends to this rank by itself.

A gloo group of two for each of them, where a broadcast is a message: what it knows of sizes that
are not as announced, of deadlines and of operations that outlive their group holds here too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.comm.rendezvous import backend_prefix, pair_prefix
from engine.errors import GroupError
from engine.protocol import JoinGroup
from engine.weights import trainer_store
from engine.weights.gloo_group import GlooGroup, connect
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look
from kernels.torch_compat import PrefixStore, Store

_POLL_S = 0.0002


@dataclass(frozen=True)
class _Tickets:
    """Of the messages of one call, each with the end that it comes to."""

    each: list[tuple[GlooGroup, Any]]


class GlooPairs:
    """This rank's ends of its connections with ranks 0 to `command.senders` - 1."""

    lands = False

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
        helpers = helpers or Helpers()
        keys = PrefixStore(command.name, store)
        trainer_store.announce_and_await(keys, command, rank, deadline, look)
        pair_keys = PrefixStore(backend_prefix(command.name, "cpu"), keys)
        self._ends: list[GlooGroup] = []
        for sender in range(command.senders):
            place = PrefixStore(pair_prefix(sender, rank), pair_keys)
            backend = connect(place, command, 1, 2, deadline)
            end = GlooGroup(
                command, 1, backend, store=store, helpers=helpers, sender=sender, world_size=2
            )
            self._ends.append(end)
        self.look = look

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See `Group`."""
        return self._ends[0].empty(num_bytes)

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> Any:
        """See `Group`."""
        raise GroupError(
            f"group {self.name!r} was formed for messages; form it without `senders`",
            field="group",
        )

    def receive(
        self, messages: Sequence[tuple[torch.Tensor, int]], deadline: float, tensor: str
    ) -> _Tickets:
        """See `Group`."""
        each = []
        for buffer, source in messages:
            end = self._ends[source]
            each.append((end, end.broadcast(buffer, 0, deadline, tensor)))
        return _Tickets(each)

    def wait(self, ticket: _Tickets, deadline: float) -> None:
        """See `Group`. Whichever connection broke is told of first, not the first of them."""
        waiting = ticket.each
        while waiting:
            left = []
            late = time.monotonic() >= deadline
            for end, one in waiting:
                if late or one.work is None or one.work.is_completed():
                    end.finish(one, deadline)
                else:
                    left.append((end, one))
            waiting = left
            if waiting:
                self.look()
                time.sleep(_POLL_S)

    def is_alive(self) -> bool:
        """See `Group`."""
        return self._ends[0].is_alive()

    def abort(self) -> bool:
        """See `Group`."""
        # All of them are asked, whatever the first says.
        ended = [end.abort() for end in self._ends]
        return all(ended)
