"""Trainer processes as threads: what the main one says reaches the others, without a group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

from recipes.world import World

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ThreadWorld(World):
    """A `World` of one thread; `meeting` and `said` are those of all."""

    meeting: Barrier
    said: list[Any] = field(default_factory=list)

    def gather(self, items: list[T]) -> list[T]:
        self.said[self.rank] = items
        self.meeting.wait()
        everything = [item for part in self.said for item in part]
        self.meeting.wait()
        return everything

    def from_main(self, value: T) -> T:
        return self.gather([value])[0]


def in_world(size: int, act: Callable[[World], T]) -> list[T]:
    """What `act` returns in each of `size` processes, all of which roll out."""
    meeting, said = Barrier(size, timeout=120), [None] * size
    worlds = [
        ThreadWorld(rank=rank, size=size, rollout_ranks=size, meeting=meeting, said=said)
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(act, world) for world in worlds]]
