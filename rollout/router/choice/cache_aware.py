"""Who has the prompt cached and has least to do; groups whole, sessions where they are.

Cost is predicted work: the bytes of prompts that a worker has to compute, plus a share for every
sequence that it decodes already. Among the holders of the longest prefixes and a few others, drawn
at random, the least wins: the power of d choices (Mitzenmacher, 2001).
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from rollout.router.choice.ask import Ask, Candidate, Choice
from rollout.router.choice.blocks import BLOCK_BYTES, blocks_of
from rollout.router.choice.numbers import Numbers
from rollout.router.choice.plain_policies import least
from rollout.router.choice.prefix_index import PrefixIndex, holder_of
from rollout.router.choice.sessions import of_session

GROUP_S = 2.0
"""Equal prompts that come within this time are a group."""
_NUM_DRAWN = 4
_ALL_UP_TO = 16
_OPEN_BYTES = 2048
"""What a running sequence counts for, in bytes of a prompt that is computed."""
_MOST_GROUPS = 4096
_FAR_MORE = 64


class CacheAware:
    """See the module. clock: seconds. num_drawn: others that are looked at beside holders, where
    there are more than 16 workers. group_s: within which equal prompts are a group; 0 for none."""

    def __init__(
        self,
        *,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        most_blocks: int = 1 << 20,
        num_drawn: int = _NUM_DRAWN,
        group_s: float = GROUP_S,
    ) -> None:
        self.index = PrefixIndex(most_blocks)
        self._random = random.Random(seed).random
        self._clock = clock
        self._num_drawn = num_drawn
        self._group_s = group_s
        self._groups: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._turn = 0
        self._workers = Numbers()

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> Choice:
        workers = self._workers
        workers.look(candidates)
        if ask.key:
            return Choice(of_session(ask.key, workers.marks, candidates), "session")
        prompt = ask.prompt
        if not prompt:
            self._turn += 1
            return Choice(least(candidates, self._turn), "least_load")
        blocks = blocks_of(prompt)
        # Of all of the prompt, whose blocks are hashed already.
        group = hash((blocks[-1] if blocks else 0, prompt[len(blocks) * BLOCK_BYTES :]))
        if group in self._groups:
            place = self._of_group(group, candidates)
            if place is not None:
                return Choice(place, "group", num_hit=len(prompt))
        num_known = self.index.num_known(blocks)
        hits: dict[int, int] = {}
        for holder, count in self.index.longest(blocks, num_known).items():
            place = workers.place_of(holder)
            if place is not None:
                hits[place] = count * BLOCK_BYTES
        place = self._cheapest(hits, candidates)
        holder = holder_of(workers.numbers[place], candidates[place].epoch)
        self.index.insert(blocks, num_known, holder)
        if self._group_s:
            self._note(group, holder)
        num_hit = hits.get(place, 0)
        return Choice(place, "prefix" if num_hit else "least_load", num_hit=num_hit)

    def _cheapest(self, hits: dict[int, int], candidates: Sequence[Candidate]) -> int:
        """The place with the least work before it. hits: cached bytes by place."""
        count = len(candidates)
        if count <= _ALL_UP_TO:
            costs = [worker.num_bytes + worker.num_open * _OPEN_BYTES for worker in candidates]
            for place, cached in hits.items():
                costs[place] -= cached
            # Those that cost the same take turns.
            first = self._turn = (self._turn + 1) % count
            costs = costs[first:] + costs[:first]
            return (costs.index(min(costs)) + first) % count
        draw = self._random
        best, least_cost = 0, float("inf")
        for place in (*hits, *[int(draw() * count) for _ in range(self._num_drawn)]):
            worker = candidates[place]
            cost = worker.num_bytes + worker.num_open * _OPEN_BYTES - hits.get(place, 0)
            if cost < least_cost:
                best, least_cost = place, cost
        return best

    def _of_group(self, group: int, candidates: Sequence[Candidate]) -> int | None:
        """Where the prompt went a moment ago, unless that worker has far more than others."""
        holder, since = self._groups[group]
        now = self._clock()
        place = self._workers.place_of(holder) if now - since <= self._group_s else None
        if place is None or _has_far_more(candidates[place].num_open, candidates):
            return None
        self._groups[group] = (holder, now)
        return place

    def _note(self, group: int, holder: int) -> None:
        self._groups[group] = (holder, self._clock())
        self._groups.move_to_end(group)
        while len(self._groups) > _MOST_GROUPS:
            self._groups.popitem(last=False)


def _has_far_more(num_open: int, candidates: Sequence[Candidate]) -> bool:
    """Whether so many sequences are far more than the median worker's."""
    if num_open <= _FAR_MORE:
        return False
    loads = sorted(worker.num_open for worker in candidates)
    return num_open > 2 * loads[(len(loads) - 1) // 2] + _FAR_MORE
