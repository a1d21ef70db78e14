"""Planning prompts: the chunks of those under way, then the admission of waiting ones."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import SchedulerConfig
from engine.protocol import Request
from rollout.cache.idle_kv import IdleKv
from rollout.cache.radix_node import Match, common_prefix
from rollout.scheduler.planning.page_reserve import PageReserve
from rollout.scheduler.planning.plan_builder import PlanBuilder
from rollout.scheduler.planning.queue import WaitingQueue
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence


class PrefillPlanner:
    """Spends the tokens a step has left on prompts.

    Pages are shared in the step that writes them, since a step writes the KV of all its
    rows, layer by layer, before it reads any. A page is copied only once an earlier step
    wrote it. So a request waits for the next plan when that would let it copy its whole
    prompt, and for as long as another sequence is still computing more of its prompt.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        running: RunningSet,
        queue: WaitingQueue,
        reserve: PageReserve,
        on_admit: Callable[[Sequence], None],
        prepared: Callable[[Request], bool],
    ) -> None:
        self._max_chunk_tokens = max(1, config.max_chunk_tokens)
        self._running = running
        self._queue = queue
        self._reserve = reserve
        self._on_admit = on_admit
        self._prepared = prepared
        self.num_unprepared = 0
        self._peeked: dict[str, int] = {}
        self._peeked_at = (-1, -1)

    def plan(self, builder: PlanBuilder, budget: int) -> None:
        """Add prompt chunks of at most `budget` tokens in all. `num_unprepared` is then how many
        waiting sequences were passed over because they are not prepared."""
        self.num_unprepared = 0
        for sequence in list(self._running.prefilling.values()):
            budget -= self._plan_chunk(builder, sequence, budget)
        if budget > 0 and len(self._queue) and self._running.num_free_slots:
            self._admit(builder, budget)

    def _admit(self, builder: PlanBuilder, budget: int) -> None:
        slots_left = self._running.num_free_slots
        reserved = self._reserve.pages_for(self._running.table, self._running.slots())
        postponed: set[str] = set()
        latest = -1
        for sequence in self._queue.candidates(self._cached_tokens):
            if budget <= 0 or slots_left <= 0:
                break
            if not self._prepared(sequence.request):
                self.num_unprepared += 1
                continue
            # A postponed request keeps its place: its group is worth more than a new one.
            slots_left -= 1
            if sequence.request.group and sequence.request.group in postponed:
                continue
            held = self._held(sequence)
            match = None if held is not None else self._match(sequence, builder.step)
            if match is not None and self._worth_waiting(sequence, match):
                postponed.add(sequence.request.group)
                continue
            if held is not None and not self._go_on(builder, sequence, held, reserved):
                break
            if held is None and not self._start(builder, sequence, match, reserved):
                break
            latest = max(latest, sequence.arrival)
            budget -= self._plan_chunk(builder, sequence, budget)
            reserved += self._reserve.pages_of(self._running.table, sequence.slot)
        if latest >= 0:
            self._queue.admitted(latest)

    def _start(
        self, builder: PlanBuilder, sequence: Sequence, match: Match | None, reserved: int
    ) -> bool:
        """Move `sequence` from the queue to a slot; False if pages are short."""
        cache = self._running.cache
        needed = cache.pages_for(len(sequence.tokens)) + reserved
        held = self._hold(match, needed)
        if held is None and match is not None:
            return False
        if match is None and not cache.can_have(needed):
            return False
        self._queue.remove(sequence)
        slot = self._running.start(sequence, held)
        self._on_admit(sequence)
        builder.add_new_row(sequence)
        if held is not None:
            builder.add_pages(slot, 0, held.pages)
            self._plan_copy(builder, slot, held)
        return True

    def _held(self, sequence: Sequence) -> IdleKv | None:
        """The KV that the session of a turn holds for it; None without."""
        request, cache = sequence.request, self._running.cache
        if not request.session:
            return None
        return cache.idle.fit(
            request.session,
            sequence.tokens,
            sequence.match_limit,
            kv_policy=request.kv_policy,
            page_size=cache.page_size,
            refcounts=cache.pool.refcounts,
        )

    def _go_on(self, builder: PlanBuilder, sequence: Sequence, held: IdleKv, reserved: int) -> bool:
        """Move a session's turn from the queue to a slot, with what the session holds; False if
        pages for the rest are short."""
        cache, session = self._running.cache, sequence.request.session
        needed = cache.pages_for(len(sequence.tokens)) + reserved - len(held.pages)
        if not cache.can_have(needed, but=session):
            return False
        self._queue.remove(sequence)
        slot = self._running.start_turn(sequence, cache.idle.take(session))
        self._on_admit(sequence)
        builder.add_new_row(sequence)
        builder.add_pages(slot, 0, held.pages)
        return True

    def _hold(self, match: Match | None, needed: int) -> Match | None:
        """Acquire `match` if that leaves `needed` pages, less those matched; else without
        the page to copy, which holds one page more; else None and nothing is held."""
        if match is None or self._acquired(match, needed):
            return match
        if match.source is not None and self._acquired(bare := match.without_copy(), needed):
            return bare
        return None

    def _acquired(self, match: Match, needed: int) -> bool:
        cache = self._running.cache
        cache.acquire(match)
        if cache.can_have(needed - len(match.pages)):
            return True
        cache.release_source(match)
        cache.release(match.pages, match.node)
        return False

    def _plan_copy(self, builder: PlanBuilder, slot: int, match: Match) -> None:
        if match.source is None:
            return
        cache = self._running.cache
        pages = cache.allocate(1)
        assert pages is not None, "a sequence was admitted without pages for it"
        builder.add_pages(slot, self._running.table.add_pages(slot, pages), pages)
        builder.add_copy(match, int(pages[0]))

    def _plan_chunk(self, builder: PlanBuilder, sequence: Sequence, budget: int) -> int:
        """Add the next chunk of a prompt; returns its tokens, 0 if pages or budget lack."""
        table, cache, slot = self._running.table, self._running.cache, sequence.slot
        computed, target = int(table.num_computed[slot]), int(table.target[slot])
        end = self._chunk_end(computed, target, budget, int(table.num_pages[slot]))
        if end <= computed:
            return 0
        pages = cache.allocate(cache.pages_for(end) - int(table.num_pages[slot]))
        assert pages is not None, "a chunk was planned without pages for it"
        if len(pages):
            builder.add_pages(slot, table.add_pages(slot, pages), pages)
        table.num_computed[slot] = end
        last = end == target
        sample = last and sequence.samples
        builder.add_prefill(slot, end - computed, sample=sample, last=last)
        shared = end if last else end // cache.page_size * cache.page_size
        self._running.share(sequence, shared, builder.step)
        if last:
            self._running.finish_prefill(sequence)
        return end - computed

    def _chunk_end(self, computed: int, target: int, budget: int, num_pages: int) -> int:
        cache = self._running.cache
        end = min(target, computed + min(budget, self._max_chunk_tokens))
        cache.can_have(cache.pages_for(end) - num_pages)
        end = min(end, (num_pages + cache.num_available) * cache.page_size)
        aligned = end // cache.page_size * cache.page_size
        return aligned if end < target and aligned > computed else end

    def _match(self, sequence: Sequence, step: int) -> Match | None:
        return self._running.cache.match(
            sequence.tokens,
            sequence.match_limit,
            version=self._running.version,
            salt=sequence.request.salt,
            step=step,
        )

    def _worth_waiting(self, sequence: Sequence, match: Match) -> bool:
        limit, have = sequence.match_limit, match.num_tokens
        if have >= limit:
            return False
        if match.num_pending >= limit:
            return True
        page_size = self._running.cache.page_size
        for other in self._running.prefilling.values():
            if not other.pure or other.request.salt != sequence.request.salt:
                continue
            shared = min(common_prefix(other.tokens, sequence.tokens), limit)
            usable = shared if shared == limit else shared // page_size * page_size
            if usable > have:
                return True
        return False

    def _cached_tokens(self, sequence: Sequence) -> int:
        """Cached prefix of `sequence` or of another sample of its group: same prompt."""
        cache, version = self._running.cache, self._running.version
        state = (cache.tree.generation, version)
        if self._peeked_at != state:
            self._peeked_at = state
            self._peeked.clear()
        key = sequence.request.group or sequence.request.rid
        if key not in self._peeked:
            self._peeked[key] = cache.match_length(
                sequence.tokens,
                sequence.match_limit,
                version=version,
                salt=sequence.request.salt,
            )
        return self._peeked[key]
