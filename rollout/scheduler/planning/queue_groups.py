"""Groups of requests: the samples of one prompt keep its place in the order of the queue."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Group:
    first_arrival: int
    num_members: int


class QueueGroups:
    """The groups that have requests, each at the arrival of its first; "" is no group."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    @property
    def num_members(self) -> int:
        """Requests that are in a group."""
        return sum(group.num_members for group in self._groups.values())

    def join(self, name: str, arrival: int) -> int:
        """Count a request in; the arrival of its group's first, its own without a group."""
        if not name:
            return arrival
        group = self._groups.setdefault(name, _Group(arrival, 0))
        group.num_members += 1
        return group.first_arrival

    def leave(self, name: str) -> None:
        """Count a request out that had joined; a group without requests is forgotten."""
        if not name:
            return
        group = self._groups[name]
        group.num_members -= 1
        if not group.num_members:
            del self._groups[name]

    def clear(self) -> None:
        """Forget every group."""
        self._groups.clear()
