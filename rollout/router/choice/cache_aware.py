"""Who has the prompt cached and has least to do; groups whole, sessions where they are.

Cost is predicted work: the bytes of prompts that a worker has to compute, plus a share for every
sequence that it decodes already. Among the holders of the longest prefixes and a few others, drawn
at random, the least wins: the power of d choices (Mitzenmacher, 2001). A session's worker is that
of the greatest hash of key and worker (rendezvous hashing: Thaler and Ravishankar, 1998), passed
over while it has more than 1.25 times the mean load (bounded loads: Mirrokni, Thorup and
Zadimoghaddam, 2018).
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

from rollout.router.choice.ask import Ask, Candidate, Choice
from rollout.router.choice.plain_policies import least
from rollout.router.choice.prefix_index import BLOCK_BYTES, Holder, PrefixIndex, blocks_of

GROUP_S = 2.0
"""Equal prompts that come within this time are a group."""
_NUM_DRAWN = 4
_ALL_UP_TO = 16
_OPEN_BYTES = 2048
"""What a running sequence counts for, in bytes of a prompt that is computed."""
_BOUND = 1.25
_SLACK = 4.0
_MOST_GROUPS = 4096


class CacheAware:
    """See the module. clock: seconds."""

    def __init__(
        self,
        *,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        most_blocks: int = 1 << 20,
    ) -> None:
        self.index = PrefixIndex(most_blocks)
        self._random = random.Random(seed)
        self._clock = clock
        self._groups: OrderedDict[int, tuple[Holder, float]] = OrderedDict()
        self._turn = 0
        self._candidates: Sequence[Candidate] = ()
        self._places: dict[str, int] = {}

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> Choice:
        if ask.key:
            return Choice(_of_session(ask.key, candidates), "session")
        if not ask.prompt:
            self._turn += 1
            return Choice(least(candidates, self._turn), "least_load")
        places = self._places_of(candidates)
        group = hash(ask.prompt)
        place = self._of_group(group, places, candidates)
        if place is not None:
            return Choice(place, "group", num_hit=len(ask.prompt))
        blocks = blocks_of(ask.prompt)
        hits: dict[int, int] = {}
        for holder, count in self.index.longest(blocks):
            place = _place_of(holder, places, candidates)
            if place is not None:
                hits[place] = count
        place = self._cheapest(len(ask.prompt), hits, candidates)
        chosen = candidates[place]
        holder = (chosen.url, chosen.epoch)
        self.index.insert(blocks, holder)
        self._note(group, holder)
        num_hit = hits.get(place, 0) * BLOCK_BYTES
        return Choice(place, "prefix" if num_hit else "least_load", num_hit=num_hit)

    def _cheapest(self, size: int, hits: dict[int, int], candidates: Sequence[Candidate]) -> int:
        count = len(candidates)
        if count <= _ALL_UP_TO:
            self._turn += 1
            places = [(at + self._turn) % count for at in range(count)]
        else:
            places = [*hits, *(self._random.randrange(count) for _ in range(_NUM_DRAWN))]

        def cost(place: int) -> int:
            worker = candidates[place]
            new = size - hits.get(place, 0) * BLOCK_BYTES
            return new + worker.num_bytes + worker.num_open * _OPEN_BYTES

        return min(places, key=cost)

    def _of_group(
        self, group: int, places: dict[str, int], candidates: Sequence[Candidate]
    ) -> int | None:
        """Where the prompt went a moment ago, unless that worker has far more than others."""
        found = self._groups.get(group)
        if found is None or self._clock() - found[1] > GROUP_S:
            return None
        place = _place_of(found[0], places, candidates)
        if place is None:
            return None
        loads = sorted(worker.num_open for worker in candidates)
        median = loads[(len(loads) - 1) // 2]
        if candidates[place].num_open > 2 * median + 64:
            return None
        self._groups[group] = (found[0], self._clock())
        return place

    def _places_of(self, candidates: Sequence[Candidate]) -> dict[str, int]:
        """The candidates' places by URL; they are the same object until one comes or goes."""
        if candidates is not self._candidates:
            self._candidates = candidates
            self._places = {worker.url: at for at, worker in enumerate(candidates)}
        return self._places

    def _note(self, group: int, holder: Holder) -> None:
        self._groups[group] = (holder, self._clock())
        self._groups.move_to_end(group)
        while len(self._groups) > _MOST_GROUPS:
            self._groups.popitem(last=False)


def _of_session(key: bytes, candidates: Sequence[Candidate]) -> int:
    most = _BOUND * sum(worker.num_open for worker in candidates) / len(candidates) + _SLACK

    def weight(place: int) -> bytes:
        return blake2b(candidates[place].url.encode(), key=key[:64], digest_size=8).digest()

    order = sorted(range(len(candidates)), key=weight, reverse=True)
    return next((at for at in order if candidates[at].num_open <= most), order[0])


def _place_of(
    holder: Holder, places: dict[str, int], candidates: Sequence[Candidate]
) -> int | None:
    """Where a holder is among the candidates; None if it is not, or has lost what it held."""
    url, epoch = holder
    place = places.get(url)
    return place if place is not None and candidates[place].epoch == epoch else None
