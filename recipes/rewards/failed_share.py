"""Replies that could not be graded: counted, and the end of a run that has too many of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from engine.errors import GradingFailed
from recipes.types import Group, Trajectory

WINDOW = 5
"""Steps over which the share is taken."""
SHOWN_CHARS = 80


def failed_figures(groups: Sequence[Group]) -> dict[str, float]:
    """How many replies of a step have no grade, their share, and how many of each kind."""
    kinds, num = _kinds(groups), sum(len(_replies(group)) for group in groups)
    return {
        "completions/num_ungraded": float(kinds.total()),
        "rewards/failed_share": kinds.total() / max(num, 1),
        **{f"rewards/failed/{kind}": float(count) for kind, count in sorted(kinds.items())},
    }


def tell_failed(groups: Sequence[Group]) -> str:
    """For a person: how many replies of a step have no grade, why, and the first of them; "" if all
    have one."""
    failed = [(group, t) for group in groups for t in _replies(group) if t.failed]
    if not failed:
        return ""
    group, first = failed[0]
    kinds = ", ".join(f"{count} {kind}" for kind, count in _kinds(groups).most_common())
    return (
        f"{len(failed)} replies not graded, and left out ({kinds}); {first.failed}: reply "
        f"{_short(first.text)} to {_short(group.problem.question)}"
    )


class FailedShare:
    """Ends a run whose rewards fail.

    The share is that of the last `WINDOW` steps, where steps before the first count as graded: one
    step that fails whole is a fifth, and a share above `most` that stays ends the run within five
    steps. most: 0 allows none, 1 any.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._shares: deque[float] = deque(maxlen=WINDOW)

    def add(self, groups: Sequence[Group]) -> None:
        """Take in the replies of a step. Raises GradingFailed above the share."""
        self._shares.append(failed_figures(groups)["rewards/failed_share"])
        share = sum(self._shares) / WINDOW
        if share > self._most:
            raise GradingFailed(
                f"reward: {share:.0%} of the replies of the last {WINDOW} steps could not be "
                f"graded, and at most {self._most:.0%} may (--max-failed-share): "
                f"{tell_failed(groups)}",
                field="reward",
            )


def _replies(group: Group) -> tuple[Trajectory, ...]:
    return group.trajectories if group.greedy is None else (*group.trajectories, group.greedy)


def _kinds(groups: Sequence[Group]) -> Counter[str]:
    failed = (t.failed for group in groups for t in _replies(group) if t.failed)
    return Counter(each.partition(":")[0] for each in failed)


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
