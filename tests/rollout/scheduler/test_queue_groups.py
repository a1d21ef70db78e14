"""The place of a group in the order of the queue."""

from __future__ import annotations

from rollout.scheduler.planning.queue_groups import QueueGroups


def test_a_group_stands_where_its_first_came_until_its_last_has_left() -> None:
    groups = QueueGroups()
    assert [groups.join("a", 3), groups.join("", 4), groups.join("a", 5)] == [3, 4, 3]
    assert groups.num_members == 2
    groups.leave("a")
    assert groups.join("a", 6) == 3
    for _ in range(2):
        groups.leave("a")
    groups.leave("")
    assert groups.num_members == 0
    assert groups.join("a", 9) == 9
    groups.clear()
    assert groups.num_members == 0
