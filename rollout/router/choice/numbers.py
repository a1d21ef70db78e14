"""Workers as numbers, which an index of a million prefixes holds in place of URLs."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.router.choice.ask import Candidate
from rollout.router.choice.prefix_index import holder_of, number_of
from rollout.router.choice.sessions import mark

_MOST_URLS = 1 << 16


class Numbers:
    """A number for each URL, which nobody else ever gets. numbers, marks: of the candidates, by
    place; a mark is the same in every router."""

    def __init__(self) -> None:
        self._by_url: dict[str, int] = {}
        self._places: dict[int, int] = {}
        self._next = 0
        self._candidates: Sequence[Candidate] = ()
        self.numbers: list[int] = []
        self.marks: list[int] = []

    def look(self, candidates: Sequence[Candidate]) -> None:
        """Take the candidates; they are the same object until one comes or goes."""
        if candidates is self._candidates:
            return
        self._candidates = candidates
        self.numbers = [self._number_of(worker.url) for worker in candidates]
        self.marks = [mark(worker.url.encode()) for worker in candidates]
        self._places = {number: place for place, number in enumerate(self.numbers)}
        if len(self._by_url) > _MOST_URLS:
            # What the index knows of those that are gone is void.
            urls = [worker.url for worker in candidates]
            self._by_url = dict(zip(urls, self.numbers, strict=True))

    def place_of(self, holder: int) -> int | None:
        """Where a holder is among the candidates; None if it is not, or has lost what it held."""
        number = number_of(holder)
        place = self._places.get(number)
        if place is None or holder_of(number, self._candidates[place].epoch) != holder:
            return None
        return place

    def _number_of(self, url: str) -> int:
        found = self._by_url.get(url)
        if found is None:
            found = self._by_url[url] = self._next
            self._next += 1
        return found
