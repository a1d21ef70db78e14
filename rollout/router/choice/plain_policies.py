"""Round robin and least load."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.router.choice.ask import Ask, Candidate, Choice


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> Choice:
        place = self._next % len(candidates)
        self._next += 1
        return Choice(place, "round_robin")


class LeastLoad:
    """The one with the fewest requests, then the fewest bytes of prompts; those that are alike take
    turns."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> Choice:
        self._next += 1
        return Choice(least(candidates, self._next), "least_load")


def least(candidates: Sequence[Candidate], first: int) -> int:
    """Place of the least loaded candidate, looked for from place `first` on, round the list."""
    opened = [worker.num_open for worker in candidates]
    fewest = min(opened)
    count = len(candidates)
    alike = [place for place in range(count) if opened[place] == fewest]
    first %= count
    return min(alike, key=lambda place: (candidates[place].num_bytes, (place - first) % count))
