"""How the shards of several trainer ranks reach the engines: what `ShardedCarrier` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.errors import GroupError
from engine.protocol import BeginUpdate, LeaveGroup
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.fleet import Member, on_each
from trainer_bridge.process_group import Backend
from trainer_bridge.update_target import UpdateTarget, try_send


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a `ShardedCarrier` was told. name: of its groups. address: of this trainer rank."""

    device: torch.device
    address: str
    name: str
    bucket_bytes: int
    timeout_s: float

    @property
    def backend(self) -> Backend:
        """Of the groups."""
        return "nccl" if self.device.type == "cuda" else "gloo"


class Trainers:
    """The ranks of one trainer, which agree after every stage of an update. group: of gloo; None
    for the default one."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def agree(self, act: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a stage on every trainer rank; returns all results, or raises on all ranks.

        A stage makes no collective call of its own: one that failed alone would leave the
        others waiting in it.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = act(*args)
        except Exception as error:
            # Whatever it is, the other ranks have to hear of it: they wait for this one.
            failure = error
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (text, result), group=self._group)
        if failure is not None:
            raise failure
        for rank, (other, _) in enumerate(outcomes):
            if other is not None:
                raise GroupError(f"trainer rank {rank} failed: {other}", field=f"rank {rank}")
        return [result for _, result in outcomes]


class Way(Protocol):
    """Groups with the engines, formed once and kept, and what they carry.

    members: the engines that take the update, on trainer rank 0; empty elsewhere.
    """

    def is_ready(self, begin: BeginUpdate, members: Sequence[Member]) -> bool:
        """Whether this rank can carry without `form`."""
        ...

    def form(self, begin: BeginUpdate, members: Sequence[Member], source: WeightSource) -> None:
        """Form the groups that are not there, and agree on what travels. Collective, over
        `Trainers.agree`."""
        ...

    def carry(self, begin: BeginUpdate, members: Sequence[Member], source: WeightSource) -> None:
        """Bring the tensors of the open update to the members: a stage of `Trainers.agree`."""
        ...

    def group_names(self) -> list[str]:
        """Of the groups that engines are in."""
        ...

    def drop(self) -> None:
        """Leave the groups. Idempotent."""
        ...


def are_members(members: Sequence[Member], joined: Sequence[str], groups: Sequence[str]) -> bool:
    """Whether the engines are those that `joined` names, none of which was started again."""
    same = [member.name for member in members] == list(joined)
    return same and all(set(groups) <= set(member.state.groups) for member in members)


def leave_all(targets: Sequence[UpdateTarget], groups: Sequence[str]) -> None:
    """Have engines leave groups, on the way out of a failure or at the end."""

    def leave(target: UpdateTarget) -> None:
        for name in groups:
            try_send(target, LeaveGroup(name=name))

    on_each(targets, leave)


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Around a stage that all ranks are in: `stop` tells the others when it fails here."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            stop()
