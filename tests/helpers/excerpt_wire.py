"""A wire that holds what trainer ranks sent until an engine rank asks for it, in any memory: what
NCCL does, without a GPU or a thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from engine.errors import GroupError
from engine.protocol import BeginUpdate, JoinGroup, ReceiveExcerpts, TensorSpec
from engine.weights.helpers import nothing
from engine.weights.lane import Look
from engine.weights.service import WeightService
from tests.helpers.excerpt_senders import CPU, NAME, Shards
from trainer_bridge.excerpt_plan import plan_command, plan_sends
from trainer_bridge.excerpt_sender import ExcerptSender

Queues = dict[tuple[int, int], deque[torch.Tensor]]


class WireEnd:
    """A trainer rank's end, as `ExcerptSender` uses one."""

    def __init__(self, sender: int, queues: Queues) -> None:
        self._sender = sender
        self._queues = queues

    def send(self, messages: Sequence[tuple[torch.Tensor, int]], check: Any) -> None:
        for tensor, rank in messages:
            self._queues.setdefault((self._sender, rank), deque()).append(tensor.clone())

    def wait(self, work: None, deadline: float, check: Any) -> None:
        """All is there already."""

    def abort(self) -> None:
        """Nothing to drop."""


class WireGroup:
    """An engine rank's end. landed: how often a message arrived outside memory of `empty`.

    fails_at: the call of `receive` that breaks, having written half. ends: what `abort` says.
    """

    lands = True

    def __init__(self, rank: int, queues: Queues) -> None:
        self.name = NAME
        self.look: Look = nothing
        self.landed = 0
        self.num_calls = 0
        self.fails_at = -1
        self.ends = True
        self._rank = rank
        self._queues = queues
        self._lent: set[int] = set()

    def empty(self, num_bytes: int) -> torch.Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._lent.add(memory.data_ptr())
        return memory

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> None:
        raise AssertionError

    def receive(
        self, messages: Sequence[tuple[torch.Tensor, int]], deadline: float, tensor: str
    ) -> Callable[[], None]:
        self.num_calls += 1
        fails = self.num_calls == self.fails_at

        def arrive() -> None:
            for buffer, source in messages:
                data = self._queues[source, self._rank].popleft()
                assert data.numel() == buffer.numel(), "both ends cut alike"
                self.landed += buffer.data_ptr() not in self._lent
                end = data.numel() // 2 if fails else data.numel()
                buffer[:end].copy_(data[:end])
            if fails:
                raise GroupError("it broke", field=tensor)

        return arrive

    def wait(self, ticket: Callable[[], None], deadline: float) -> None:
        ticket()

    def is_alive(self) -> bool:
        return True

    def abort(self) -> bool:
        return self.ends


def join(rank: WeightService, place: int, size: int, queues: Queues) -> WireGroup:
    """Have an engine rank be number `place` behind `size` trainer ranks."""
    group = WireGroup(size + place, queues)
    command = JoinGroup(
        name=NAME,
        address="127.0.0.1",
        port=1,
        rank_offset=size + place - rank.groups.rank,
        world_size=size + 64,
        senders=size,
        backend="gloo",
    )
    with mock.patch.object(rank.groups, "_connect", lambda *_: group):
        rank.handle(command)
    return group


def send(
    ranks: Sequence[WeightService],
    manifest: Sequence[TensorSpec],
    shards: list[Shards],
    queues: Queues,
    **sizes: int,
) -> None:
    """Plan, and put everything on the wire."""
    pieces = [[piece for piece, _ in own] for own in shards]
    begin = BeginUpdate(version=0, manifest=list(manifest))
    sizes = {"bucket_bytes": 2000, "direct_bytes": 64} | sizes
    command = plan_command(NAME, begin, pieces, timeout_s=60.0, **sizes)
    needs = [found for rank in ranks for found in rank.handle(command).excerpts]
    for sender, own in enumerate(shards):
        end: Any = WireEnd(sender, queues)
        stages = plan_sends(command, sender, needs)
        deadline = time.monotonic() + 60.0
        ExcerptSender(end, CPU).send(stages, pieces[sender], iter(own), deadline=deadline)


def receive(rank: WeightService) -> None:
    """Take everything from the wire."""
    rank.handle(ReceiveExcerpts(group=NAME, timeout_s=60.0))
