"""Groups that are whole and graded and wait to be trained."""

from __future__ import annotations

from collections.abc import Iterable

from recipes.types import Group


class RolloutBuffer:
    """Gives out the oldest groups first, by their position in the training stream.

    What a batch does not take stays: nothing is lost, and what is older goes first.
    """

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._groups: dict[int, Group] = {}
        for group in groups:
            self.put(group)

    def put(self, group: Group) -> None:
        """Add a group, whose position no other has."""
        assert group.position not in self._groups, group.position
        self._groups[group.position] = group

    def groups(self) -> list[Group]:
        """All of them, oldest first; they stay."""
        return [self._groups[position] for position in sorted(self._groups)]

    def count(self, before: int | None = None) -> int:
        """How many there are. before: of positions below it alone."""
        if before is None:
            return len(self._groups)
        return sum(position < before for position in self._groups)

    def pop_oldest(self, num: int, before: int | None = None) -> list[Group]:
        """Take out the `num` oldest, or as many as there are. before: as in `count`."""
        positions = [p for p in sorted(self._groups) if before is None or p < before]
        return [self._groups.pop(position) for position in positions[:num]]
