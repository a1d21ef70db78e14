"""Processor time of a process and of those that it started, by what they are, from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_ROLES = (("leader_main", "leader"), ("rank_main", "rank"), ("front_main", "fronts"))


def tree_of(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += tree_of(int(child))
    return found


def seconds_by_role(pid: int) -> dict[str, float]:
    """Seconds so far; "server" is the process itself, where fronts serve the owner of the
    engine."""
    found: dict[str, float] = defaultdict(float)
    for process in tree_of(pid):
        command = Path(f"/proc/{process}/cmdline").read_text()
        role = next((role for name, role in _ROLES if name in command), "server")
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        found[role] += (int(fields[11]) + int(fields[12])) * _TICK_S
    return dict(found)


def between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Seconds from one reading to the next."""
    return {role: round(after[role] - before.get(role, 0.0), 3) for role in after}
